//! A TCP proxy on 127.0.0.1 that can be told to be slow or silent, to cut connections and to refuse them.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What the network is like at this moment.
#[derive(Debug, Clone, Copy, Default)]
struct Weather {
    /// Each piece of data waits so long, in either direction.
    delay: Duration,
    /// New connections are closed at once.
    refuse: bool,
    /// Nothing gets through, and nobody is told.
    silent: bool,
    /// Connections begun under a smaller number are cut.
    cuts: u64,
}

/// Dropping it cuts every connection.
#[derive(Debug)]
pub struct Proxy {
    host: String,
    weather: Arc<watch::Sender<Weather>>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// Listens on a port of its own and passes everything on to `target` (`host:port`).
    pub async fn start(target: &str) -> Result<Self> {
        Self::start_between(Ipv4Addr::LOCALHOST, target, Ipv4Addr::LOCALHOST).await
    }

    /// The same, listening on this address, and coming from `source`, so that the target's log tells who came: all of
    /// 127.0.0.0/8 is this machine.
    pub async fn start_between(listen: Ipv4Addr, target: &str, source: Ipv4Addr) -> Result<Self> {
        let listener = TcpListener::bind((listen, 0)).await.context("bind the proxy")?;
        let host = listener.local_addr()?.to_string();
        let weather = Arc::new(watch::Sender::new(Weather::default()));
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, target.to_owned(), source.into(), Arc::clone(&weather)));
        Ok(Self { host, weather, _tasks: tasks })
    }

    /// `127.0.0.1:PORT`
    pub fn host(&self) -> String {
        self.host.clone()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.host())
    }

    /// From now on each piece of data takes so much longer, one way.
    pub fn delay(&self, delay: Duration) {
        self.weather.send_modify(|weather| weather.delay = delay);
    }

    /// From now on, or no longer: connections stand and are taken, and nothing comes through, either way. What was sent meanwhile
    /// arrives afterwards, as by a network that sends it again.
    pub fn silence(&self, silent: bool) {
        self.weather.send_modify(|weather| weather.silent = silent);
    }

    /// Cuts every connection there is, in the middle of whatever it carries.
    pub fn cut(&self) {
        self.weather.send_modify(|weather| weather.cuts += 1);
    }

    /// From now on, or no longer: nobody gets through. Connections that stand are left alone.
    pub fn refuse(&self, refuse: bool) {
        self.weather.send_modify(|weather| weather.refuse = refuse);
    }
}

async fn accept(listener: TcpListener, target: String, source: IpAddr, weather: Arc<watch::Sender<Weather>>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        if !weather.borrow().refuse {
            connections.spawn(carry(client, target.clone(), source, weather.subscribe()));
        }
    }
}

async fn carry(client: TcpStream, target: String, source: IpAddr, mut weather: watch::Receiver<Weather>) {
    let connect = async {
        let socket = TcpSocket::new_v4()?;
        socket.bind((source, 0).into())?;
        socket.connect(target.parse().map_err(std::io::Error::other)?).await
    };
    let Ok(server) = connect.await else { return };
    // Small pieces are passed on as they come; an error here costs speed only.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let begun = weather.borrow().cuts;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let (there, back) = (weather.clone(), weather.clone());
    tokio::select! {
        _ = async { tokio::join!(pass(from_client, to_server, there), pass(from_server, to_client, back)) } => {}
        _ = weather.wait_for(|weather| weather.cuts > begun) => {}
    }
}

/// Passes one direction on, until its end.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut weather: watch::Receiver<Weather>) {
    let mut piece = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut piece).await {
        let delay = weather.borrow().delay;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        if weather.wait_for(|weather| !weather.silent).await.is_err() {
            return;
        }
        if to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
    // The other side may be gone already.
    let _ = to.shutdown().await;
}
