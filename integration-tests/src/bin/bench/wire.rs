//! HTTP with as little around it as there can be: one kept connection a worker, and nothing that is not asked for. What it
//! costs to ask this way is the floor that everything else is held against.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{HOST, HeaderMap};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Nothing on this machine takes longer to answer.
const LIMIT: Duration = Duration::from_secs(30);

/// One connection, opened again if the other side has closed it.
pub struct Wire {
    host: String,
    sender: SendRequest<Full<Bytes>>,
    connection: JoinSet<()>,
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    /// The answer, if it has this status.
    pub fn expect(self, status: StatusCode, doing: &str) -> Result<Self> {
        let words = || String::from_utf8_lossy(&self.body);
        ensure!(self.status == status, "{doing}: {} instead of {status}: {}", self.status, words());
        Ok(self)
    }
}

impl Wire {
    /// `host` is an address and a port.
    pub async fn open(host: &str) -> Result<Self> {
        let stream = TcpStream::connect(host).await.with_context(|| format!("connect to {host}"))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { drop(connection.await) });
        Ok(Self { host: host.to_owned(), sender, connection: tasks })
    }

    /// `path` with its query.
    pub async fn ask(&mut self, method: Method, path: &str, headers: &[(&str, &str)], body: Bytes) -> Result<Answer> {
        if self.sender.ready().await.is_err() {
            self.connection.abort_all();
            *self = Self::open(&self.host).await?;
        }
        let mut request = Request::builder().method(method).uri(path).header(HOST, &self.host);
        for (name, value) in headers.iter().filter(|(name, _)| *name != "host") {
            request = request.header(*name, *value);
        }
        let exchange = async {
            let response = self.sender.send_request(request.body(Full::new(body))?).await?;
            let (head, body) = response.into_parts();
            anyhow::Ok(Answer { status: head.status, headers: head.headers, body: body.collect().await?.to_bytes() })
        };
        let answered = tokio::time::timeout(LIMIT, exchange).await;
        answered.with_context(|| format!("no answer from {path} within {LIMIT:?}"))?.with_context(|| format!("ask for {path}"))
    }

    pub async fn get(&mut self, path: &str) -> Result<Answer> {
        self.ask(Method::GET, path, &[], Bytes::new()).await
    }
}

/// What workers do again and again.
pub trait Work: Send + Sync + 'static {
    /// Does it for the `number`th time.
    fn one(&self, number: usize, wire: &mut Wire) -> impl Future<Output = Result<()>> + Send;
}

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// So often, by all workers together.
    Count(usize),
    Time(Duration),
}

/// How it went.
pub struct Done {
    pub took: Duration,
    /// How long each took, in no order.
    pub each: Vec<Duration>,
}

impl Done {
    pub fn per_second(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "counts of a benchmark are far below 2^52")]
        let count = self.each.len() as f64;
        count / self.took.as_secs_f64()
    }
}

/// Has `workers` at it at once, each with a connection of its own to `host`, opened before the clock starts.
pub async fn at_once(host: &str, workers: usize, until: Until, work: &Arc<impl Work>) -> Result<Done> {
    let mut wires = Vec::new();
    for _ in 0..workers {
        wires.push(Wire::open(host).await?);
    }
    let next = Arc::new(AtomicUsize::new(0));
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for mut wire in wires {
        let (next, work) = (Arc::clone(&next), Arc::clone(work));
        tasks.spawn(async move {
            let mut each = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let over = match until {
                    Until::Count(count) => number >= count,
                    Until::Time(span) => begun.elapsed() >= span,
                };
                if over {
                    return anyhow::Ok(each);
                }
                let start = Instant::now();
                work.one(number, &mut wire).await?;
                each.push(start.elapsed());
            }
        });
    }
    let mut each = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        each.extend(ended??);
    }
    Ok(Done { took: begun.elapsed(), each })
}
