//! What lapin runs on: tokio, with every task on our tracker, and TCP or TLS streams that can be cut.
//!
//! lapin takes its runtime and its streams through traits. With our own, nothing is spawned that we do not wait for, TLS is
//! the same rustls with the same keys and roots as everywhere else, and a broker that has gone silent is let go of at once.

use std::{
    future::ready,
    io::{self, Read, Write},
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use async_rs::{
    traits::{Executor, Reactor, RuntimeKit},
    util::{Task, TaskImpl},
};
use async_trait::async_trait;
use futures::{Stream, stream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    runtime::Handle,
    task::JoinHandle,
    time::{Sleep, interval, sleep, sleep_until},
};
use tokio_rustls::{TlsConnector, rustls::ClientConfig, rustls::pki_types::ServerName};
use tokio_util::{
    compat::{Compat, TokioAsyncReadCompatExt as _},
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::TaskTracker,
};

use super::returns::{Returns, Scanner};

/// The runtime that lapin is given.
#[derive(Clone, Debug)]
pub(super) struct Kit {
    handle: Handle,
    tracker: TaskTracker,
}

impl Kit {
    /// Of the runtime that the caller runs in.
    pub fn new(tracker: TaskTracker) -> Self {
        Self { handle: Handle::current(), tracker }
    }
}

impl RuntimeKit for Kit {}

impl Executor for Kit {
    type Task<T: Send + 'static> = Spawned<T>;

    fn block_on<T, F: Future<Output = T>>(&self, future: F) -> T {
        self.handle.block_on(future)
    }

    fn spawn<T: Send + 'static, F: Future<Output = T> + Send + 'static>(&self, future: F) -> Task<Spawned<T>> {
        Spawned(self.tracker.spawn_on(future, &self.handle)).into()
    }

    fn spawn_blocking<T: Send + 'static, F: FnOnce() -> T + Send + 'static>(&self, work: F) -> Task<Spawned<T>> {
        Spawned(self.tracker.spawn_blocking_on(work, &self.handle)).into()
    }
}

impl Reactor for Kit {
    type TcpStream = Compat<Wire>;
    type Sleep = Sleep;

    fn register<H: Read + Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl futures::AsyncRead + futures::AsyncWrite + Send + Unpin + 'static> {
        Err::<Compat<Wire>, _>(ours())
    }

    fn sleep(&self, time: Duration) -> Sleep {
        let _context = self.handle.enter();
        sleep(time)
    }

    fn interval(&self, period: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        let _context = self.handle.enter();
        stream::unfold(interval(period), async |mut interval| Some((interval.tick().await.into_std(), interval)))
    }

    fn tcp_connect_addr(&self, _: SocketAddr) -> impl Future<Output = io::Result<Compat<Wire>>> + Send + 'static {
        ready(Err(ours()))
    }
}

/// lapin asks for neither: [`Wire::open`] is what connects.
fn ours() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "connections are made by Wire::open")
}

/// A task of lapin's.
#[derive(Debug)]
pub(super) struct Spawned<T>(JoinHandle<T>);

#[async_trait]
impl<T: Send + 'static> TaskImpl for Spawned<T> {
    async fn cancel(&mut self) -> Option<T> {
        self.0.abort();
        (&mut self.0).await.ok()
    }
}

impl<T: Send + 'static> Future for Spawned<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        match Pin::new(&mut self.0).poll(context) {
            Poll::Ready(Ok(output)) => Poll::Ready(output),
            // It panicked, or the runtime ends: nobody will hear from it.
            Poll::Ready(Err(_)) | Poll::Pending => Poll::Pending,
        }
    }
}

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection to a broker that ends when its token is cancelled, or when the broker was silent for too long.
pub(super) struct Wire {
    stream: Box<dyn Duplex>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    patience: Patience,
    /// When silence has been too long.
    late: Pin<Box<Sleep>>,
    scanner: Scanner,
}

/// How long a broker may be silent, while it owes a heartbeat.
#[derive(Clone, Debug)]
pub(super) struct Patience(Arc<AtomicU64>);

impl Patience {
    /// For as many seconds between heartbeats as were agreed on; 0 if there are none, and no limit.
    ///
    /// The broker looks every half of that time whether it has said anything, so it is never silent for more than all of it. It
    /// ends a connection, and gives what it delivered there to others, when it has heard nothing for twice the time at least:
    /// 1.5 times after the network fell silent at the earliest, since our last words may be half a time old by then. We have to
    /// know before, at 1.3 times: what is handed over must be in our hands no more.
    pub fn new(heartbeat: u16) -> Self {
        let patience = Self(Arc::default());
        patience.agree(heartbeat);
        patience
    }

    /// As in [`Patience::new`], from the next word of the broker's on.
    pub fn agree(&self, heartbeat: u16) {
        self.0.store(u64::from(heartbeat) * 1_300, Ordering::Relaxed);
    }

    fn end(&self) -> tokio::time::Instant {
        let forever = Duration::from_secs(365 * 24 * 3600);
        let limit = Some(self.0.load(Ordering::Relaxed)).filter(|limit| *limit > 0).map_or(forever, Duration::from_millis);
        tokio::time::Instant::now() + limit
    }
}

impl Wire {
    /// Connects; with TLS if that is given.
    pub async fn open(
        host: &str,
        port: u16,
        tls: Option<Arc<ClientConfig>>,
        cut: CancellationToken,
        patience: Patience,
        returns: Returns,
    ) -> io::Result<Compat<Self>> {
        let tcp = TcpStream::connect((host.trim_matches(['[', ']']), port)).await?;
        tcp.set_nodelay(true)?;
        // What the broker has not got when we give it up, it must not get later: it is sent again by then.
        tcp.set_zero_linger()?;
        let stream: Box<dyn Duplex> = match tls {
            None => Box::new(tcp),
            Some(config) => {
                let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned()).map_err(io::Error::other)?;
                Box::new(TlsConnector::from(config).connect(name, tcp).await?)
            }
        };
        let late = Box::pin(sleep_until(patience.end()));
        let (cut, scanner) = (Box::pin(cut.cancelled_owned()), Scanner::new(returns));
        Ok(Self { stream, cut, patience, late, scanner }.compat())
    }

    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match pin!(&mut self.cut).poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionAborted.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        let before = into.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, into);
        if read.is_ready() {
            self.scanner.see(&into.filled()[before..]);
            let end = self.patience.end();
            self.late.as_mut().reset(end);
        } else if self.late.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the broker has sent no heartbeat")));
        }
        read
    }
}

impl AsyncWrite for Wire {
    // Whoever writes reads as well, and hears of the cut there.
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
