use std::{
    convert::Infallible,
    error::Error as StdError,
    future::poll_fn,
    net::SocketAddr,
    panic::AssertUnwindSafe,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    response::{IntoResponse, Response},
};
use futures::FutureExt;
use http::{
    HeaderValue, Request, StatusCode,
    header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER},
};
use http_body_util::{BodyExt, Limited};
use hyper::{
    body::{Body as _, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;
use tracing::{debug, error, warn};

use super::{
    Error, Problem, Tls,
    body::Bounded,
    impatient::Impatient,
    listener::{Listener, Stream},
};

/// What a listener bears before it says no.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of a request's body; 413 beyond.
    pub max_body: u64,
    /// From the first moment of a connection, or the end of the last answer, to the end of a request's head: slower or
    /// idle connections are closed. Also for the TLS handshake.
    pub header_timeout: Duration,
    /// From the head to the end of the body, 408 beyond; and how long a client may take nothing of its answer.
    pub body_timeout: Duration,
    /// Requests in hand at once; 503 beyond. Probes and metrics are answered regardless.
    pub max_requests: usize,
    /// Connections at once; more wait in the system's backlog, which is short.
    pub max_connections: usize,
}

impl Default for Limits {
    /// 5 MiB hold an event with a manifest of the largest size that registries take (4 MiB).
    fn default() -> Self {
        Self {
            max_body: 5 << 20,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            max_requests: 512,
            max_connections: 2048,
        }
    }
}

/// Bytes of a request's head; 431 beyond.
const MAX_HEAD: usize = 32 << 10;
/// An orchestrator must not kill a daemon for being busy.
const ALWAYS_ANSWERED: [&str; 3] = ["/livez", "/readyz", "/metrics"];
/// How long a closed connection is read on, so that the client sees our last answer before the reset (RFC 9112 section 9.6).
const LINGER: Duration = Duration::from_secs(1);

/// Requests that were turned away before anything saw them.
#[derive(Debug, Default)]
pub struct Counters {
    busy: AtomicU64,
    too_large: AtomicU64,
    panicked: AtomicU64,
}

impl Counters {
    /// Each reason with its count. They only ever grow.
    #[must_use]
    pub fn refused(&self) -> [(&'static str, u64); 3] {
        [
            ("busy", self.busy.load(Relaxed)),
            ("too_large", self.too_large.load(Relaxed)),
            ("panicked", self.panicked.load(Relaxed)),
        ]
    }
}

/// A bound listener: connections wait from now on, and are answered once it is served.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    limits: Limits,
    counters: Arc<Counters>,
}

impl Server {
    /// Listens on a TCP address, with TLS if there is a certificate.
    pub async fn bind(address: SocketAddr, limits: Limits, tls: Option<Tls>) -> Result<Self, Error> {
        Ok(Self { listener: Listener::tcp(address, tls).await?, limits, counters: Arc::default() })
    }

    /// Listens on a socket file that only this user can connect to. A stale file is replaced; one that somebody listens on
    /// is [`Error::InUse`]. The file is removed when serving ends.
    pub async fn bind_unix(path: &Path, limits: Limits) -> Result<Self, Error> {
        Ok(Self { listener: Listener::unix(path).await?, limits, counters: Arc::default() })
    }

    /// The TCP address, with the port that the system chose for port 0.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.listener.local_addr()
    }

    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Answers until `drain` is cancelled; then listens no more, closes idle connections, and returns when the last request
    /// in hand is answered, or at once when `abort` is cancelled. Errors that `router` answers in another form are made
    /// problem documents.
    pub async fn serve(self, router: Router, drain: CancellationToken, abort: CancellationToken) {
        let connections = Arc::new(Semaphore::new(self.limits.max_connections));
        let service = Arc::new(Service {
            router,
            requests: Semaphore::new(self.limits.max_requests),
            limits: self.limits,
            counters: self.counters,
            drain: drain.clone(),
        });
        let tracker = TaskTracker::new();
        while let Some(accepted) = drain.run_until_cancelled(accept(&self.listener, &connections)).await {
            match accepted {
                Ok((stream, place)) => {
                    let connection = Arc::clone(&service).connection(stream);
                    let abort = abort.clone();
                    tracker.spawn(async move {
                        abort.run_until_cancelled(connection).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    warn!(error = &error as &dyn StdError, "a connection could not be accepted");
                    // Out of file descriptors, most likely: asking again at once would only burn CPU.
                    drain.run_until_cancelled(sleep(Duration::from_millis(20))).await;
                }
            }
        }
        drop(self.listener);
        tracker.close();
        tracker.wait().await;
    }
}

async fn accept(listener: &Listener, connections: &Arc<Semaphore>) -> std::io::Result<(Stream, OwnedSemaphorePermit)> {
    let place = Arc::clone(connections).acquire_owned().await.expect("the semaphore is never closed");
    Ok((listener.accept().await?, place))
}

/// What all connections of a listener share.
struct Service {
    router: Router,
    requests: Semaphore,
    limits: Limits,
    counters: Arc<Counters>,
    drain: CancellationToken,
}

impl Service {
    /// Each kind of conversation in a box of its own size: connections are many, and TLS is large.
    async fn connection(self: Arc<Self>, stream: Stream) {
        match stream {
            Stream::Tcp(stream) => Box::pin(self.converse(stream)).await,
            Stream::Unix(stream) => Box::pin(self.converse(stream)).await,
            Stream::Tls(stream, tls) => {
                match timeout(self.limits.header_timeout, Box::pin(tls.acceptor().accept(stream))).await {
                    Ok(Ok(stream)) => Box::pin(self.converse(Box::new(stream))).await,
                    Ok(Err(error)) => debug!(error = &error as &dyn StdError, "a TLS handshake failed"),
                    Err(_) => debug!("a TLS handshake took too long"),
                }
            }
        }
    }

    async fn converse<I: AsyncRead + AsyncWrite + Unpin + 'static>(self: Arc<Self>, stream: I) {
        let drain = self.drain.clone();
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(self.limits.header_timeout).max_header_size(MAX_HEAD);
        let stream = Impatient::new(stream, self.limits.body_timeout);
        let service = service_fn(move |request| Box::pin(Arc::clone(&self).answer(request)));
        let mut connection = builder.serve_connection(TokioIo::new(stream), service);
        let mut done = drain.run_until_cancelled(poll_fn(|cx| connection.poll_without_shutdown(cx))).await;
        if done.is_none() {
            Pin::new(&mut connection).graceful_shutdown();
            done = Some(poll_fn(|cx| connection.poll_without_shutdown(cx)).await);
        }
        if let Some(Err(error)) = done {
            debug!(error = &error as &dyn StdError, "a connection ended early");
        }
        linger(connection.into_parts().io.into_inner()).await;
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Response, Infallible> {
        let place = self.requests.try_acquire();
        if place.is_err() && !ALWAYS_ANSWERED.contains(&request.uri().path()) {
            self.counters.busy.fetch_add(1, Relaxed);
            let problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, "too many requests at once; send it again");
            return Ok(([(RETRY_AFTER, HeaderValue::from_static("1"))], problem).into_response());
        }
        if request.body().size_hint().lower() > self.limits.max_body {
            self.counters.too_large.fetch_add(1, Relaxed);
            let detail = format!("the request's body is larger than {} bytes", self.limits.max_body);
            let problem = Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail);
            return Ok(([(CONNECTION, HeaderValue::from_static("close"))], problem).into_response());
        }
        let request = request.map(|body| {
            if body.is_end_stream() {
                Body::empty()
            } else {
                Body::new(Bounded::new(body, self.limits.max_body, self.limits.body_timeout))
            }
        });
        // One bad request must not take its connection's answer, nor vanish unseen.
        let Ok(answer) = AssertUnwindSafe(self.router.clone().oneshot(request)).catch_unwind().await else {
            self.counters.panicked.fetch_add(1, Relaxed);
            error!("a request handler panicked: this is a bug, please report it with the lines before this one");
            return Ok(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "this is a bug; the log says more").into_response());
        };
        let Ok(response) = answer;
        Ok(as_problem(response).await)
    }
}

/// Gives an error that is not JSON the form that all errors have.
async fn as_problem(response: Response) -> Response {
    let status = response.status();
    let is_json = |value: &HeaderValue| value.as_bytes().ends_with(b"json");
    if !(status.is_client_error() || status.is_server_error()) || response.headers().get(CONTENT_TYPE).is_some_and(is_json) {
        return response;
    }
    let (head, body) = response.into_parts();
    let text = Limited::new(body, 4096).collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let detail = match std::str::from_utf8(&text) {
        Ok(text) if !text.is_empty() => text,
        _ => status.canonical_reason().unwrap_or("error"),
    };
    let mut problem = Problem::new(status, detail).into_response();
    for (name, value) in head.headers {
        if let Some(name) = name.filter(|name| name != CONTENT_TYPE && name != CONTENT_LENGTH) {
            problem.headers_mut().append(name, value);
        }
    }
    problem
}

/// Says that nothing more will be written, and reads what is still under way.
async fn linger<I: AsyncRead + AsyncWrite + Unpin>(mut stream: I) {
    let rest = async {
        stream.shutdown().await?;
        let mut nothing = [0; 512];
        while stream.read(&mut nothing).await? > 0 {}
        std::io::Result::Ok(())
    };
    // However it ends, the connection is closed.
    let _ = timeout(LINGER, rest).await;
}

#[cfg(test)]
mod tests;
