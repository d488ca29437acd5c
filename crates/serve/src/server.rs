//! Listens, and drains when told to stop.
//!
//! Read next: `routes.rs`.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;

use crate::app::App;
use crate::error::ServeError;
use crate::routes::router;

/// How long clients may take to read the last bytes of their answers.
const LINGER: std::time::Duration = std::time::Duration::from_secs(2);
/// Threads that speak HTTP; computing has threads of its own.
const HTTP_THREADS: usize = 2;

/// Where to listen, and what to do once it does.
pub struct ServerOptions {
    /// The host's name or address.
    pub host: String,
    /// The port; 0 for any that is free.
    pub port: u16,
    /// Called when the server listens.
    pub on_listening: Box<dyn FnOnce(Listening) + Send>,
}

/// A server that listens.
pub struct Listening {
    /// Where.
    pub address: SocketAddr,
    /// Stops it: requests that run are answered, new ones are not taken.
    pub stop: tokio::sync::mpsc::UnboundedSender<()>,
}

/// Serves until told to stop by a signal or by [`Listening::stop`], and the last request is
/// answered.
pub fn serve(app: App, options: ServerOptions) -> Result<(), ServeError> {
    let address = format!("{}:{}", options.host, options.port);
    let listen = |source| ServeError::Listen { address: address.clone(), source };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(HTTP_THREADS)
        .enable_all()
        .build()
        .map_err(listen)?;
    let app = Arc::new(app);
    let pool = app.pool.clone();
    runtime.block_on(async {
        let listener = TcpListener::bind(&address).await.map_err(listen)?;
        let bound = listener.local_addr().map_err(listen)?;
        let (stop, stopped) = tokio::sync::mpsc::unbounded_channel();
        (options.on_listening)(Listening { address: bound, stop: stop.clone() });
        let (drained, drain) = tokio::sync::watch::channel(false);
        let told = drains(Arc::clone(&app), stopped, drained);
        let serving = axum::serve(listener, router(&app)).with_graceful_shutdown(told);
        tokio::select! {
            ended = serving => ended.map_err(listen)?,
            () = lingers(drain) => eprintln!("gave up connections that were still open"),
        }
        drop(stop);
        Ok::<(), ServeError>(())
    })?;
    pool.stop();
    runtime.shutdown_background();
    Ok(())
}

/// Ends when the server is to close its connections: told to stop, and nothing left to answer.
///
/// Until then connections are taken and told that the server is stopping, so that whoever watches
/// `/ready` sends requests elsewhere.
async fn drains(
    app: Arc<App>,
    mut stopped: tokio::sync::mpsc::UnboundedReceiver<()>,
    drained: tokio::sync::watch::Sender<bool>,
) {
    tokio::select! {
        () = signalled() => {}
        _ = stopped.recv() => {}
    }
    app.seats.stop();
    let limit = app.limits.drain_time;
    if tokio::time::timeout(limit, app.seats.empty()).await.is_err() {
        eprintln!("gave up requests that still ran after {limit:?}");
    }
    // The receiver lives as long as the server.
    let _ = drained.send(true);
}

/// Ends some time after connections were to be closed.
async fn lingers(mut drain: tokio::sync::watch::Receiver<bool>) {
    if drain.wait_for(|drained| *drained).await.is_ok() {
        tokio::time::sleep(LINGER).await;
    }
}

/// Waits for Ctrl-C or SIGTERM.
async fn signalled() {
    let interrupt = tokio::signal::ctrl_c();
    let terminate = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            // Without the signal there is still Ctrl-C.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = interrupt => {}
        () = terminate => {}
    }
}
