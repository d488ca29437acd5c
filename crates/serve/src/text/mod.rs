//! Between tokens and what clients read: bytes of tokens, stop texts, reasoning and tool calls.
//!
//! No HTTP here. Read next: `splitter.rs`.

pub mod grammar;
pub mod splitter;
pub mod stops;
pub mod token_bytes;
pub mod tool_call;
