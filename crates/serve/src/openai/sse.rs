//! Server-sent events: a task that writes, a body that is read, and nothing lost in between.
//!
//! When the client leaves, the task's next write fails and it ends, which gives its requests up.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::errors::ApiError;
use super::flow::{Flow, Step};
use crate::app::App;

/// Pieces that wait for a slow client before its task waits too.
const PIECES_WAITING: usize = 64;
/// How long a stream is silent before it says that it is alive, below proxies' usual minute.
const SILENCE: Duration = Duration::from_secs(15);

/// The client has left.
pub struct Left;

/// Where a task writes its stream.
pub struct Out {
    sender: Sender<Bytes>,
}

impl Out {
    /// One event without a name.
    pub async fn data(&self, value: &Value) -> Result<(), Left> {
        self.raw(format!("data: {value}\n\n")).await
    }

    /// One event with its name, as newer APIs have it.
    pub async fn named(&self, name: &str, value: &Value) -> Result<(), Left> {
        self.raw(format!("event: {name}\ndata: {value}\n\n")).await
    }

    /// The end, as OpenAI's older APIs have it.
    pub async fn done(&self) -> Result<(), Left> {
        self.raw("data: [DONE]\n\n".to_owned()).await
    }

    async fn raw(&self, text: String) -> Result<(), Left> {
        self.sender.send(Bytes::from(text)).await.map_err(|_| Left)
    }

    /// The next step of a flow, keeping the stream alive meanwhile; an error if the client leaves.
    pub async fn next(
        &self,
        flow: &mut Flow<'_>,
    ) -> Result<Result<Option<(usize, Step)>, ApiError>, Left> {
        loop {
            tokio::select! {
                step = flow.next() => return Ok(step),
                () = self.sender.closed() => return Err(Left),
                () = tokio::time::sleep(SILENCE) => self.raw(": still here\n\n".to_owned()).await?,
            }
        }
    }
}

/// A response whose body a task writes.
pub fn stream<F, T>(app: Arc<App>, task: T) -> Response
where
    T: FnOnce(Arc<App>, Out) -> F,
    F: Future<Output = Result<(), Left>> + Send + 'static,
{
    let (sender, receiver) = channel(PIECES_WAITING);
    let work = task(app, Out { sender });
    tokio::spawn(async move {
        // A client that has left needs no answer.
        let _ = work.await;
    });
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-cache")];
    (headers, Body::from_stream(Pieces(receiver))).into_response()
}

struct Pieces(Receiver<Bytes>);

impl futures_core::Stream for Pieces {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|piece| piece.map(Ok))
    }
}
