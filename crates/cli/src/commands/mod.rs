//! One file for each command: its arguments, and what it does with them.

pub mod bench;
pub mod bisect;
pub mod compare;
pub mod data;
pub mod demo;
pub mod devices;
pub mod eval;
pub mod export;
pub mod faults;
pub mod generate;
pub mod moving;
pub mod new;
pub mod qualify;
pub mod run_status;
pub mod score;
pub mod serve;
pub mod show;
pub mod simulate;
pub mod status;
pub mod stop;
pub mod tokenizer;
pub mod train;
pub mod watch;
pub mod worker;
