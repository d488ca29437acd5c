//! Training data: texts in, token shards on disk, micro-batches out.
//!
//! Nothing here knows a model or a device.
