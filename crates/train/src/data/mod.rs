//! Training data: texts in, token shards on disk, micro-batches out.
//!
//! Nothing here knows a model or a device. Read next: `import.rs` (texts), `shard.rs` (the file),
//! `pack.rs` (sequences), `order.rs` (which when).

mod error;
mod map;
mod order;
mod pack;
mod shard;

pub use error::DataError;
pub use pack::{Batch, Cut, Dataset, Order};
pub use shard::{Shard, ShardWriter};
