//! Several replicas of one installation, on one RabbitMQ and one PostgreSQL ledger, before one registry whose log tells them
//! apart.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use reqwest::{Client, Response, StatusCode};
use serde_json::Value;

use crate::daemon::{Daemon, Metrics};
use crate::house::{House, Plan, TOKEN};
use crate::namespace::Namespace;
use crate::postgres::Postgres;
use crate::process::{eventually, http_client};
use crate::proxy::Proxy;
use crate::rabbitmq::RabbitMq;
use crate::registry::{Notify, Options, Served};

const LIMIT: Duration = Duration::from_secs(120);

#[derive(Debug)]
pub struct Fleet {
    // Dropped in this order.
    pub replicas: Vec<Daemon>,
    /// Registry, key and commands; its own daemon is never started.
    pub house: House,
    pub broker: RabbitMq,
    pub database: Postgres,
    /// Of the ledger.
    name: String,
    /// What each replica reaches the registry by.
    pub registries: Vec<Proxy>,
    _ledgers: Vec<Proxy>,
}

/// Where a replica runs.
#[derive(Debug)]
struct Place<'a> {
    /// Its own address.
    listen: Ipv4Addr,
    /// Where it finds registry, broker and database.
    servers: Ipv4Addr,
    /// What the registry's log calls it.
    source: Ipv4Addr,
    namespace: Option<&'a Namespace>,
}

impl Fleet {
    /// So many replicas, not started yet; with these further lines of `[queue]`.
    pub async fn build(replicas: u8, queue: &str) -> Result<Self> {
        let place = |number| Place {
            listen: Ipv4Addr::LOCALHOST,
            servers: Ipv4Addr::LOCALHOST,
            source: Ipv4Addr::new(127, 0, 1, number),
            namespace: None,
        };
        Self::build_at((1..=replicas).map(place).collect(), queue).await
    }

    /// A replica in each namespace, not started yet; the servers are where this process is.
    pub async fn build_in(namespaces: &[Namespace], queue: &str) -> Result<Self> {
        let places = namespaces.iter().map(|namespace| Place {
            listen: namespace.there,
            servers: namespace.here,
            source: namespace.here,
            namespace: Some(namespace),
        });
        Self::build_at(places.collect(), queue).await
    }

    async fn build_at(places: Vec<Place<'_>>, queue: &str) -> Result<Self> {
        let elsewhere = places.iter().map(|place| place.servers).filter(|address| !address.is_loopback());
        let listeners = elsewhere.enumerate().map(|(n, address)| format!("listeners.tcp.{} = {address}:{{amqp}}\n", n + 2));
        let broker = RabbitMq::start_with(&(listeners.collect::<String>() + "loopback_users = none\n")).await?;
        let database = Postgres::start()?;
        let name = database.database()?;
        let house = House::build(Plan {
            queue: format!("backend = \"amqp\"\nurl = {{ env = \"AMQP_URL\" }}\n{queue}"),
            registry: Options { notify: Some(Notify::nobody()), count_requests: true, ..Options::default() },
            ledger: Some("{ env = \"LEDGER_URL\" }".to_owned()),
            environment: vec![("AMQP_URL", broker.url()), ("LEDGER_URL", database.url(&name))],
            ..Plan::default()
        })
        .await?;
        // So that the broker may be killed from here on.
        house.run(&["queue", "status"]).await?.expect_code(0)?;
        broker.sync().await?;

        let (mut replicas, mut registries, mut ledgers) = (vec![], vec![], vec![]);
        for (number, place) in places.into_iter().enumerate() {
            let registry = Proxy::start_between(place.servers, &house.registry.host(), place.source).await?;
            let ledger = Proxy::start_between(place.servers, &database.host(), Ipv4Addr::LOCALHOST).await?;
            let amqp_url = broker.url().replace("127.0.0.1", &place.servers.to_string());
            let ledger_url = database.url(&name).replace(&database.host(), &ledger.host());
            let config = house.config().replacen(&house.registry.url(), &registry.url(), 1);
            let environment = [("AMQP_URL", amqp_url), ("LEDGER_URL", ledger_url)];
            let replica = house.replica(&format!("replica{number}"), &config, &environment)?;
            replicas.push(match place.namespace {
                Some(namespace) => replica.moved_to(namespace, place.listen)?,
                None => replica,
            });
            registries.push(registry);
            ledgers.push(ledger);
        }
        Ok(Self { replicas, house, broker, database, name, registries, _ledgers: ledgers })
    }

    /// Starts all that do not run, and waits until each is ready.
    pub async fn start(&mut self) -> Result<()> {
        for replica in &mut self.replicas {
            if replica.is_running()? {
                continue;
            }
            replica.start().await?;
        }
        Ok(())
    }

    pub fn sender(&self) -> Result<Sender> {
        let urls = self.replicas.iter().map(|replica| format!("{}/events/main", replica.url())).collect();
        Ok(Sender { http: http_client()?, urls, counts: Arc::default() })
    }

    /// What the ledger's database answers: rows as lines.
    pub fn sql(&self, sql: &str) -> Result<String> {
        self.database.sql(&self.name, sql)
    }

    /// Waits until all replicas say the same: so many events at least were received, none is queued any more, and the sums add up.
    pub async fn wait_settled(&self, received: u64) -> Result<Metrics> {
        self.wait_until(&format!("{received} events are received and settled"), |metrics| {
            metrics.received() >= received && metrics.queued() == 0 && metrics.adds_up()
        })
        .await
    }

    /// The same, whatever the sums are.
    pub async fn wait_quiet(&self, received: u64) -> Result<Metrics> {
        self.wait_until(&format!("{received} events are received, and none is queued"), |metrics| {
            metrics.received() >= received && metrics.queued() == 0
        })
        .await
    }

    async fn wait_until(&self, what: &str, settled: impl Fn(&Metrics) -> bool) -> Result<Metrics> {
        let metrics = eventually(what, LIMIT, async || {
            let mut all = vec![];
            for replica in &self.replicas {
                // It answers 503 until it is connected.
                let Ok(metrics) = replica.metrics().await else { return Ok(None) };
                all.push(metrics);
            }
            Ok(all.iter().all(&settled).then(|| all.remove(0)))
        });
        match metrics.await {
            Ok(metrics) => Ok(metrics),
            Err(error) => {
                let mut said = String::new();
                for replica in &self.replicas {
                    said += &match replica.metrics().await {
                        Ok(metrics) => sums(&metrics),
                        Err(error) => format!("{error:#}"),
                    };
                    said.push('\n');
                }
                Err(error.context(said))
            }
        }
    }
}

/// On one line.
pub fn sums(metrics: &Metrics) -> String {
    let ended = ["signed", "already_signed", "skipped", "dead"].map(|outcome| format!("{outcome} {}", metrics.ended(outcome)));
    format!("received {} = {} + queued {}", metrics.received(), ended.join(" + "), metrics.queued())
}

/// Tells the replicas of pushes, as a registry does that knows several of them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Sender {
    http: Client,
    urls: Vec<String>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    taken: AtomicU64,
    refused: AtomicU64,
    broken: AtomicU64,
}

impl Sender {
    /// To this replica, once.
    pub async fn post(&self, replica: usize, body: &str) -> reqwest::Result<Response> {
        let request = self.http.post(&self.urls[replica]).bearer_auth(TOKEN).body(body.to_owned());
        request.header("content-type", "application/vnd.docker.distribution.events.v1+json").send().await
    }

    /// To any replica, until one answers 202. Anything but that and 503 is an error.
    pub async fn send(&self, event: &Value) -> Result<()> {
        self.send_text(&event.to_string()).await
    }

    pub async fn send_text(&self, body: &str) -> Result<()> {
        let mut pause = 10;
        loop {
            match self.post(fastrand::usize(..self.urls.len()), body).await {
                Ok(answer) if answer.status() == StatusCode::ACCEPTED => {
                    self.counts.taken.fetch_add(1, Ordering::Relaxed);
                    return Ok(());
                }
                Ok(answer) => {
                    let status = answer.status();
                    ensure!(status == StatusCode::SERVICE_UNAVAILABLE, "{status}: {}", answer.text().await.unwrap_or_default());
                    ensure!(answer.headers().contains_key("retry-after"), "503 without Retry-After");
                    self.counts.refused.fetch_add(1, Ordering::Relaxed);
                }
                Err(_) => {
                    self.counts.broken.fetch_add(1, Ordering::Relaxed);
                }
            }
            tokio::time::sleep(Duration::from_millis(pause)).await;
            pause = (pause * 2).min(300);
        }
    }

    /// Events that were answered 202.
    pub fn taken(&self) -> u64 {
        self.counts.taken.load(Ordering::Relaxed)
    }

    /// Answers of 503.
    pub fn refused(&self) -> u64 {
        self.counts.refused.load(Ordering::Relaxed)
    }

    /// Requests without an answer: nobody knows whether those were taken.
    pub fn broken(&self) -> u64 {
        self.counts.broken.load(Ordering::Relaxed)
    }
}

/// Holds the registry's log to this: between the look that a writer of a `.sig` tag took before it wrote, and the end of that
/// write, nobody else wrote the same. Returns how many writes there were, and how many tags more than one replica wrote.
pub fn ensure_one_writer_at_a_time(served: &[Served]) -> Result<(usize, usize)> {
    let mut tags: BTreeMap<&str, Vec<&Served>> = BTreeMap::new();
    for request in served.iter().filter(|request| request.path.contains(".sig")) {
        tags.entry(&request.path).or_default().push(request);
    }
    let (mut writes, mut shared) = (0, 0);
    for (tag, requests) in tags {
        let puts: Vec<_> = requests.iter().filter(|request| request.method == "PUT").collect();
        writes += puts.len();
        let sources: BTreeSet<IpAddr> = puts.iter().map(|put| put.source).collect();
        shared += usize::from(sources.len() > 1);
        for put in &puts {
            let looks =
                requests.iter().filter(|look| look.source == put.source && look.method == "GET" && look.ended <= put.began);
            let look = looks.max_by_key(|look| look.ended).with_context(|| format!("{tag} was written unseen: {put:?}"))?;
            let other =
                puts.iter().find(|other| other.source != put.source && other.began < put.ended && other.ended > look.began);
            ensure!(other.is_none(), "{tag} was written by two at once: {look:?}, {put:?}, {other:?}");
        }
    }
    Ok((writes, shared))
}
