//! Serving: the OpenAI API over one model on one or several devices.
//!
//! Three layers: `engine/` runs sequences on one device, `pool/` makes several devices one, and
//! `openai/` speaks HTTP and text. Which devices exist is the caller's business: it gives a
//! closure that opens one by name. Read next: `engine/mod.rs`.

pub mod app;
pub mod engine;
pub mod error;
mod metrics;
mod openai;
pub mod pool;
mod routes;
mod seats;
mod server;
mod text;

pub use app::{App, AppParts, Limits};
pub use error::ServeError;
pub use server::{Listening, ServerOptions, serve};
