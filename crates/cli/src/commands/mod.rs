//! One file for each command: its arguments, and what it does with them.

pub mod data;
pub mod devices;
pub mod new;
pub mod status;
pub mod tokenizer;
pub mod train;

mod show;
