//! `countersign serve`: the daemon, from a configuration to its exit code.

use std::{collections::HashMap, fs, path::Path, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::{Router, routing::get};
use queue::Queue;
use tracing::{error, info, warn};

use super::{open_ledger, open_queue, patience, setup, sources, state_folder, witness_settings};
use crate::{
    admin::{self, Admin, socket_path},
    clock::Clock,
    config::{self, Config},
    http::{Limits, Readiness, Server, Tls},
    intake::{self, Intake},
    ledger::Ledger,
    lifecycle::Lifecycle,
    pipeline::{Pipeline, Setup},
    telemetry::{CONTENT_TYPE, INTAKE_FAMILIES, LogHandle, Metrics, Sample, Snapshot},
    witness::Witness,
};

/// How often a key that could not be opened is tried again.
const REOPEN: Duration = Duration::from_secs(5);

/// Runs until it is told to stop.
pub async fn serve(path: &Path, config: Config, log: LogHandle) -> anyhow::Result<ExitCode> {
    let clock = Clock::system();
    let lifecycle = Lifecycle::install(config.server.grace)?;
    let queue: Arc<dyn Queue> = Arc::new(open_queue(&config, &clock)?);
    let ledger = open_ledger(&config, &clock)?;
    let metrics = Metrics::new();
    let (setup, shut) = setup(&config, &clock, &metrics).await?;
    let pipeline = Arc::new(Pipeline::new(setup, ledger.clone(), metrics.clone(), clock.clone(), patience(&config)));
    let intake = Arc::new(Intake::new(queue.clone(), clock.clone(), sources(&config)));
    attach_intake(&metrics, &intake);

    let limits = Limits {
        max_body: config.server.max_body,
        header_timeout: config.server.header_timeout,
        body_timeout: config.server.body_timeout,
        max_requests: config.server.max_requests,
        ..Limits::default()
    };
    let tls = config.server.tls.as_ref().map(open_tls).transpose()?;
    let server = Server::bind(config.server.listen, limits.clone(), tls.clone()).await?;
    let socket = Server::bind_unix(&socket_path(state_folder(&config)), limits).await?;
    let address = server.local_addr();

    let readiness = readiness(&queue, &ledger, &pipeline, &config);
    let router = intake::router(intake.clone())
        .merge(Arc::new(readiness).router())
        .merge(metrics_route(&metrics, &queue, &ledger, &clock));
    lifecycle.spawn("http", server.serve(router, lifecycle.drain(), lifecycle.abort()));
    let admin = Admin { queue: queue.clone(), ledger: ledger.clone(), pipeline: Some(pipeline.clone()), clock: clock.clone() };
    lifecycle.spawn("socket", socket.serve(admin::router(admin), lifecycle.drain(), lifecycle.abort()));
    for _ in 0..config.queue.in_flight {
        let (pipeline, queue) = (pipeline.clone(), queue.clone());
        lifecycle.spawn("worker", async move { pipeline.work(&*queue).await });
    }
    let (drain, closing) = (lifecycle.drain(), queue.clone());
    lifecycle.spawn("drain", async move {
        drain.cancelled().await;
        info!("stopping: no more events are taken, what is in hand is finished");
        closing.close().await;
    });
    let mut reloader = Reloader { path: path.to_owned(), config, clock, pipeline, intake, metrics, log, tls, shut: vec![] };
    reloader.shut = shut.into_iter().map(|(witness, _)| witness).collect();
    let (drain, mut asked) = (lifecycle.drain(), lifecycle.reload());
    lifecycle.spawn("reload", async move {
        loop {
            tokio::select! {
                () = drain.cancelled() => return,
                changed = asked.changed() => if changed.is_ok() { reloader.reload().await },
                () = tokio::time::sleep(REOPEN), if !reloader.shut.is_empty() => reloader.open_what_is_shut().await,
            }
        }
    });
    info!(version = env!("CARGO_PKG_VERSION"), address = address.map(tracing::field::display), "ready: taking events");
    Ok(lifecycle.run().await)
}

fn open_tls(tls: &config::Tls) -> anyhow::Result<Tls> {
    let certificate = fs::read(&tls.certificate).with_context(|| format!("{}: cannot be read", tls.certificate.display()))?;
    Ok(Tls::from_pem(&certificate, &tls.key.expose().to_owned().into())?)
}

fn attach_intake(metrics: &Metrics, intake: &Arc<Intake>) {
    let intake = intake.clone();
    metrics.attach(INTAKE_FAMILIES, move || {
        let samples = intake.counters().samples().into_iter();
        samples.map(|sample| Sample { name: sample.name, labels: sample.labels, value: sample.value }).collect()
    });
}

fn metrics_route(metrics: &Metrics, queue: &Arc<dyn Queue>, ledger: &Ledger, clock: &Clock) -> Router {
    let (metrics, queue, ledger, clock) = (metrics.clone(), queue.clone(), ledger.clone(), clock.clone());
    let scrape = move || {
        let (metrics, queue, ledger, clock) = (metrics.clone(), queue.clone(), ledger.clone(), clock.clone());
        async move {
            let unavailable = |error: &dyn std::error::Error| {
                crate::http::Problem::new(http::StatusCode::SERVICE_UNAVAILABLE, error.to_string())
            };
            let queue = queue.stats().await.map_err(|error| unavailable(&error))?;
            let ledger = ledger.sums().await.map_err(|error| unavailable(&error))?;
            let text = metrics.render(Snapshot { queue, ledger, now: clock.now() });
            Ok::<_, crate::http::Problem>(([(http::header::CONTENT_TYPE, CONTENT_TYPE)], text))
        }
    };
    Router::new().route("/metrics", get(scrape))
}

fn readiness(queue: &Arc<dyn Queue>, ledger: &Ledger, pipeline: &Arc<Pipeline>, config: &Config) -> Readiness {
    let (queue, ledger) = (queue.clone(), ledger.clone());
    let mut readiness = Readiness::new()
        .check("queue", move || {
            let queue = queue.clone();
            async move { queue.probe().await.map_err(|error| error.to_string()) }
        })
        .check("ledger", move || {
            let ledger = ledger.clone();
            async move { ledger.check().await.map_err(|error| error.to_string()) }
        });
    for witness in &config.witnesses {
        let (pipeline, name) = (pipeline.clone(), witness.name.clone());
        readiness = readiness.check(format!("key of witness {name}"), move || {
            let open = pipeline.setup().witnesses.contains_key(&name);
            async move { if open { Ok(()) } else { Err("not opened yet".to_owned()) } }
        });
    }
    for registry in &config.registries {
        let (pipeline, name) = (pipeline.clone(), registry.name.clone());
        readiness = readiness.check(format!("registry {name}"), move || {
            let registry = pipeline.setup().registries.get(&name).cloned();
            async move {
                match registry {
                    Some(registry) => registry.ping().await.map_err(|error| error.to_string()),
                    // Taken out of the configuration since the start.
                    None => Ok(()),
                }
            }
        });
    }
    readiness
}

/// Puts a changed configuration into force as a whole, or not at all.
struct Reloader {
    path: std::path::PathBuf,
    config: Config,
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
            Ok(()) => {
                self.metrics.config_reloaded(true);
                info!(config = %self.path.display(), "the configuration was read again and is in force");
            }
            Err(error) => {
                self.metrics.config_reloaded(false);
                error!(
                    config = %self.path.display(),
                    error = format!("{error:#}"),
                    "the configuration was read again and cannot be used: everything stays as it was"
                );
            }
        }
    }

    async fn try_reload(&mut self) -> anyhow::Result<()> {
        let (config, warnings) = Config::load(&self.path)?;
        for warning in &warnings {
            warn!("{warning}");
        }
        let restart = |what| anyhow::anyhow!("{what} cannot be changed while the daemon runs: restart it");
        let (server, before) = (&config.server, &self.config.server);
        if server.listen != before.listen || server.tls.is_some() != before.tls.is_some() {
            return Err(restart("[server] listen and tls"));
        }
        if config.queue.backend != self.config.queue.backend || config.ledger != self.config.ledger {
            return Err(restart("[queue] and [ledger]"));
        }
        let renewed_tls = config.server.tls.as_ref().map(open_tls).transpose()?;
        let (setup, shut) = setup(&config, &self.clock, &self.metrics).await?;
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
            let settings = match witness_settings(&self.config, &witness) {
                Ok(settings) => settings,
                Err(error) => {
                    warn!(witness = witness.name, error = format!("{error:#}"), "still shut");
                    still_shut.push(witness);
                    continue;
                }
            };
            match Witness::open(&settings, self.clock.clone()).await {
                Ok(open) => match super::check_rules(&self.config, &open) {
                    Ok(()) => {
                        info!(witness = witness.name, "its key is open now");
                        opened.insert(witness.name.clone(), Arc::new(open));
                    }
                    Err(error) => {
                        error!(
                            witness = witness.name,
                            error = format!("{error:#}"),
                            "its key does not suit its rules: correct them and reload"
                        );
                        still_shut.push(witness);
                    }
                },
                Err(error) => {
                    warn!(witness = witness.name, error = &error as &dyn std::error::Error, "still shut");
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
            Ok(rules) => self.pipeline.replace_setup(Setup { registries: before.registries.clone(), witnesses: opened, rules }),
            Err(error) => error!(error = format!("{error:#}"), "the rules cannot be used"),
        }
    }
}
