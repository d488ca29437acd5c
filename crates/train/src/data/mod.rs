//! Training data: texts in, token shards on disk, micro-batches out.
//!
//! Nothing here knows a model or a device. Read next: `import.rs` (texts), `shard.rs` (the file),
//! `pack.rs` (sequences), `order.rs` (which when).

mod error;
mod import;
mod map;
mod order;
mod pack;
mod prepare;
mod shard;
mod train_tokenizer;

pub use error::DataError;
pub use import::{Flow, Import, Imported};
pub use pack::{Batch, Cut, Dataset, Order, WholeDocuments};
pub use prepare::{Prepare, Prepared};
pub use shard::{Shard, ShardWriter};
pub use train_tokenizer::{SPECIAL_TOKENS, TrainedTokenizer, VOCABULARY_MIN, train_tokenizer};
