//! `countersign serve`: the daemon, from a configuration to its exit code.

use std::{collections::HashMap, fs, path::Path, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use axum::{Router, routing::get};
use futures::future::ready;
use queue::{
    Queue,
    amqp::{Letter, Take},
};
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::BoxError;
use tracing::{error, info, warn};

use super::{algorithms_of, feeds, open_ledger, open_queue, patience, setup, sources, state_folder};
use crate::{
    admin::{self, Admin, socket_path},
    clock::Clock,
    config::{self, Config},
    http::{Check, Counters, Limits, Readiness, Server, Tls},
    intake::{self, Incoming, Intake},
    ledger::Ledger,
    lifecycle::{IntoEnd, Lifecycle},
    pipeline::{Pipeline, Setup},
    telemetry::{CONTENT_TYPE, INTAKE_FAMILIES, LogHandle, Metrics, Sample, Snapshot},
};

/// How often a key that could not be opened is tried again.
const REOPEN: Duration = Duration::from_secs(5);
/// What the queue, and then the ledger, may take for a scrape: Prometheus waits for ten seconds.
const SCRAPE: Duration = Duration::from_secs(4);
const REFUSED: &[(&str, &str)] = &[("http_refused", "Requests that were turned away before anything saw them")];

/// Runs until it is told to stop.
pub async fn serve(path: &Path, config: Config, log: LogHandle) -> anyhow::Result<ExitCode> {
    let clock = Clock::system();
    let mut lifecycle = Lifecycle::install(config.server.grace)?;
    let metrics = Metrics::new();
    let opening = async {
        // Its tasks run until the process ends: the metrics and the socket ask the queue to the last. What is in hand is waited for
        // below.
        let queue = open_queue(&config, &clock, &TaskTracker::new(), true).await?;
        let ledger = open_ledger(&config, &clock).await?;
        let (setup, shut) = setup(&config, &ledger, &clock, &metrics).await?;
        anyhow::Ok((queue, ledger, setup, shut))
    };
    let Some(opened) = lifecycle.unless_stopped(opening).await else {
        info!("stopped before the queue, the ledger and all keys were open");
        return Ok(ExitCode::SUCCESS);
    };
    let (queue, ledger, setup, shut) = opened?;
    let pipeline = Pipeline::new(setup, ledger.clone(), metrics.clone(), clock.clone(), patience(&config));
    let pipeline = Arc::new(pipeline.with_slots(config.queue.in_flight));
    let intake = Arc::new(Intake::new(queue.clone(), clock.clone(), sources(&config)));
    attach_intake(&metrics, &intake);

    let limits = limits(&config.server);
    let tls = config.server.tls.as_ref().map(open_tls).transpose()?;
    let server = Server::bind(config.server.listen, limits.clone(), tls.clone()).await?;
    let socket = Server::bind_unix(&socket_path(state_folder(&config)), limits).await?;
    let address = server.local_addr();
    attach_refused(&metrics, [("http", server.counters()), ("socket", socket.counters())]);

    let readiness = readiness(&queue, &ledger, &pipeline);
    let router = intake::router(intake.clone())
        .merge(Arc::new(readiness).router())
        .merge(metrics_route(&metrics, &queue, &ledger, &pipeline, &clock));
    let grace = config.server.grace;
    lifecycle.spawn("http", in_time(lifecycle.drain(), grace, server.serve(router, lifecycle.drain(), lifecycle.abort())));
    let admin = Admin {
        queue: queue.clone(),
        ledger: ledger.clone(),
        pipeline: Some(pipeline.clone()),
        rules: Arc::default(),
        clock: clock.clone(),
    };
    let socket = socket.serve(admin::router(admin), lifecycle.drain(), lifecycle.abort());
    lifecycle.spawn("socket", in_time(lifecycle.drain(), grace, socket));
    for (source, feed) in feeds(&config) {
        let intake = intake.clone();
        let take: Take = Arc::new(move |letter: Letter| {
            let (intake, source) = (intake.clone(), source.clone());
            Box::pin(async move {
                intake.deliver(&source, &Incoming::by_broker(letter.content_type, letter.headers, letter.body)).await
            })
        });
        lifecycle.spawn("feed", in_time(lifecycle.drain(), grace, feed.run(take, TaskTracker::new(), lifecycle.drain())));
    }
    for _ in 0..config.queue.in_flight {
        let (pipeline, queue) = (pipeline.clone(), queue.clone());
        lifecycle.spawn("worker", in_time(lifecycle.drain(), grace, async move { pipeline.work(&*queue).await }));
    }
    let (drain, closing) = (lifecycle.drain(), queue.clone());
    lifecycle.spawn("drain", async move {
        drain.cancelled().await;
        info!("stopping: no more events are taken, what is in hand is finished");
        closing.close().await;
    });
    let mut reloader =
        Reloader { path: path.to_owned(), config, ledger, clock, pipeline, intake, metrics, log, tls, shut: vec![] };
    reloader.shut = shut.into_iter().map(|(witness, _)| witness).collect();
    let (drain, mut asked) = (lifecycle.drain(), lifecycle.reload());
    lifecycle.spawn("reload", async move {
        loop {
            tokio::select! {
                () = drain.cancelled() => return,
                changed = asked.changed() => if changed.is_ok() {
                    drain.run_until_cancelled(reloader.reload()).await;
                },
                () = tokio::time::sleep(REOPEN), if !reloader.shut.is_empty() => {
                    drain.run_until_cancelled(reloader.open_what_is_shut()).await;
                }
            }
        }
    });
    info!(version = env!("CARGO_PKG_VERSION"), address = address.map(tracing::field::display), "ready: taking events");
    Ok(lifecycle.run().await)
}

/// Lets `task` finish while draining, and drops it when most of the grace period is over: what it has in hand goes back to the
/// queue, and a registry or a KMS that hangs does not make an orderly stop a failure.
pub(super) async fn in_time<T: IntoEnd>(
    drain: CancellationToken,
    grace: Duration,
    task: impl Future<Output = T>,
) -> Result<(), BoxError> {
    let late = async {
        drain.cancelled().await;
        tokio::time::sleep(grace * 3 / 4).await;
    };
    tokio::select! {
        ended = task => ended.into_end(),
        () = late => {
            warn!("what is still in hand is given back to the queue");
            Ok(())
        }
    }
}

pub(super) fn limits(server: &config::Server) -> Limits {
    Limits {
        max_body: server.max_body,
        header_timeout: server.header_timeout,
        body_timeout: server.body_timeout,
        max_requests: server.max_requests,
        ..Limits::default()
    }
}

pub(super) fn open_tls(tls: &config::Tls) -> anyhow::Result<Tls> {
    let certificate = fs::read(&tls.certificate).with_context(|| format!("{}: cannot be read", tls.certificate.display()))?;
    // As it is by now: a certificate that was replaced has mostly another key.
    let key = tls.key.again().map_err(|problem| anyhow!("the certificate's key cannot be read: {problem}"))?;
    Ok(Tls::from_pem(&certificate, &key)?)
}

fn attach_intake(metrics: &Metrics, intake: &Arc<Intake>) {
    let intake = intake.clone();
    metrics.attach(INTAKE_FAMILIES, move || {
        let samples = intake.counters().samples().into_iter();
        samples.map(|sample| Sample { name: sample.name, labels: sample.labels, value: sample.value }).collect()
    });
}

/// What the listeners turned away.
pub(super) fn attach_refused<const N: usize>(metrics: &Metrics, listeners: [(&'static str, Arc<Counters>); N]) {
    metrics.attach(REFUSED, move || {
        let refused = listeners.iter().flat_map(|(listener, counters)| {
            let sample = move |(reason, value): (&str, u64)| Sample {
                name: REFUSED[0].0,
                labels: vec![("listener", (*listener).to_owned()), ("reason", reason.to_owned())],
                value,
            };
            counters.refused().map(sample)
        });
        refused.collect()
    });
}

fn metrics_route(metrics: &Metrics, queue: &Arc<dyn Queue>, ledger: &Ledger, pipeline: &Arc<Pipeline>, clock: &Clock) -> Router {
    let (metrics, queue, ledger, clock) = (metrics.clone(), queue.clone(), ledger.clone(), clock.clone());
    let pipeline = pipeline.clone();
    let scrape = move || {
        let (metrics, queue, ledger, clock) = (metrics.clone(), queue.clone(), ledger.clone(), clock.clone());
        // Of those that are in force: one that a reload replaced may end its life away.
        for (name, witness) in &pipeline.setup().witnesses {
            metrics.kms_away(name, witness.is_away());
            if let Some(threads) = witness.stuck_threads() {
                metrics.kms_stuck_threads(name, threads);
            }
        }
        async move {
            // What does not answer is told of by `countersign_up`; why is at /readyz. The queue first: see `Snapshot`.
            let queue = timeout(SCRAPE, queue.stats()).await.ok().and_then(Result::ok);
            let ledger = timeout(SCRAPE, ledger.sums()).await.ok().and_then(Result::ok);
            let snapshot = Snapshot { queue, ledger, now: clock.now() };
            ([(http::header::CONTENT_TYPE, CONTENT_TYPE)], metrics.render(snapshot))
        }
    };
    Router::new().route("/metrics", get(scrape))
}

fn readiness(queue: &Arc<dyn Queue>, ledger: &Ledger, pipeline: &Arc<Pipeline>) -> Readiness {
    let (queue, ledger, pipeline) = (queue.clone(), ledger.clone(), pipeline.clone());
    Readiness::new()
        .check("queue", move || {
            let queue = queue.clone();
            async move { queue.probe().await.map_err(|error| error.to_string()) }
        })
        .check("ledger", move || {
            let ledger = ledger.clone();
            async move { ledger.check().await.map_err(|error| error.to_string()) }
        })
        // Of what is in force now: a reload adds and removes.
        .checks(move || {
            let setup = pipeline.setup();
            let check = |name: &String| format!("key of witness {name}");
            let open = setup.witnesses.iter().map(|(name, witness)| -> Check {
                let algorithm = algorithms_of(&setup.rules, witness)[0];
                let witness = witness.clone();
                (check(name), Box::pin(async move { witness.ready(algorithm).await }))
            });
            let shut =
                setup.shut.iter().map(|name| -> Check { (check(name), Box::pin(ready(Err("not opened yet".to_owned())))) });
            let registries = setup.registries.iter().map(|(name, registry)| -> Check {
                let registry = registry.clone();
                (format!("registry {name}"), Box::pin(async move { registry.ping().await.map_err(|error| error.to_string()) }))
            });
            let mut checks: Vec<_> = open.chain(shut).chain(registries).collect();
            checks.sort_by(|(one, _), (other, _)| one.cmp(other));
            checks
        })
}

/// What of `[server]` holds as long as the process.
pub(super) fn fixed(server: &config::Server) -> impl PartialEq {
    let limits = (server.max_body, server.max_requests, server.header_timeout, server.body_timeout);
    (server.listen, server.tls.is_some(), server.grace, limits)
}

/// Puts a changed configuration into force as a whole, or not at all.
struct Reloader {
    path: std::path::PathBuf,
    config: Config,
    ledger: Ledger,
    clock: Clock,
    pipeline: Arc<Pipeline>,
    intake: Arc<Intake>,
    metrics: Metrics,
    log: LogHandle,
    tls: Option<Tls>,
    /// Witnesses whose KMS could not be reached yet.
    shut: Vec<config::Witness>,
}

impl Reloader {
    async fn reload(&mut self) {
        match self.try_reload().await {
            // What is counted is in the log already.
            Ok(()) => {
                info!(config = %self.path.display(), "the configuration was read again and is in force");
                self.metrics.config_reloaded(true);
            }
            Err(error) => {
                error!(
                    config = %self.path.display(),
                    error = format!("{error:#}"),
                    "the configuration was read again and cannot be used: everything stays as it was"
                );
                self.metrics.config_reloaded(false);
            }
        }
    }

    async fn try_reload(&mut self) -> anyhow::Result<()> {
        let (config, warnings) = Config::load(&self.path)?;
        for warning in &warnings {
            warn!("{warning}");
        }
        let restart = |what| anyhow::anyhow!("{what} cannot be changed while the daemon runs: restart it");
        // What is said to be in force is: whatever is not taken over below is refused here.
        if fixed(&config.server) != fixed(&self.config.server) {
            return Err(restart("[server], except the certificate and key of `tls`,"));
        }
        let queue = |config: &Config| config.queue.clone();
        if queue(&config) != queue(&self.config) || config.ledger != self.config.ledger {
            return Err(restart("[queue] and [ledger]"));
        }
        let queues = |config: &Config| -> Vec<_> {
            config.sources.iter().filter_map(|source| Some((source.name.clone(), source.queue.clone()?))).collect()
        };
        if queues(&config) != queues(&self.config) {
            return Err(restart("a source's `queue`"));
        }
        if config.log.format != self.config.log.format {
            return Err(restart("[log] format"));
        }
        let renewed_tls = config.server.tls.as_ref().map(open_tls).transpose()?;
        let (setup, shut) = setup(&config, &self.ledger, &self.clock, &self.metrics).await?;
        // Nothing below can fail.
        if let Err(error) = self.log.set_filter(&config.log.level.to_string()) {
            warn!(error = &error as &dyn std::error::Error, "the log level stays as it was");
        }
        if let (Some(tls), Some(renewed)) = (&self.tls, &renewed_tls) {
            tls.replace(renewed);
        }
        self.pipeline.replace_setup(setup);
        self.intake.replace_sources(sources(&config));
        self.shut = shut.into_iter().map(|(witness, _)| witness).collect();
        self.config = config;
        Ok(())
    }

    /// Keys whose KMS was away join the set-up when it is back.
    async fn open_what_is_shut(&mut self) {
        let mut still_shut = vec![];
        let mut opened = HashMap::new();
        for witness in std::mem::take(&mut self.shut) {
            match super::open_witness(&self.config, &witness, &self.ledger, &self.clock, &self.metrics).await {
                Ok(Ok(open)) => {
                    info!(witness = witness.name, "its key is open now");
                    opened.insert(witness.name.clone(), open);
                }
                Ok(Err(error)) => {
                    warn!(witness = witness.name, error = &error as &dyn std::error::Error, "still shut");
                    still_shut.push(witness);
                }
                Err(error) => {
                    error!(
                        witness = witness.name,
                        error = format!("{error:#}"),
                        "its key does not suit its rules or its certificate: correct them and reload"
                    );
                    still_shut.push(witness);
                }
            }
        }
        self.shut = still_shut;
        if opened.is_empty() {
            return;
        }
        let before = self.pipeline.setup();
        opened.extend(before.witnesses.iter().map(|(name, witness)| (name.clone(), witness.clone())));
        match super::rules(&self.config) {
            Ok(rules) => {
                let shut = self.shut.iter().map(|witness| witness.name.clone()).collect();
                self.pipeline.replace_setup(Setup { registries: before.registries.clone(), witnesses: opened, rules, shut });
            }
            Err(error) => error!(error = format!("{error:#}"), "the rules cannot be used"),
        }
    }
}
