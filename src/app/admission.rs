//! `countersign admission`: the webhook, from a configuration to its exit code; and what the command line judges manifests by.

use std::{
    collections::{BTreeSet, HashSet},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use axum::{Router, routing::get};
use http::header::CONTENT_TYPE;
use tracing::{error, info};

use super::{
    daemon::{attach_refused, fixed, in_time, limits},
    known,
    recheck::Rounds,
    registry_settings,
    serving::Serving,
};
use crate::{
    admission::{
        self, Authority, Counters, Daemon, DockerConfig, Examiner, ExaminerSettings, GroupKind, Judge, Kinds, Looks, Webhook,
    },
    clock::Clock,
    config::{self, Certificate, Config},
    http::{Readiness, Server},
    kubernetes::Cluster,
    lifecycle::Lifecycle,
    policy::{Patterns, Policies},
    registry::{Credentials, Registry, Timeouts},
    telemetry::{CONTENT_TYPE as METRICS_TYPE, LogHandle, Metrics, Sample},
    verify::Known,
    witness,
};

const REMEMBERED: &[(&str, &str)] = &[
    ("admission_cache_hits", "Questions about images that were answered from memory"),
    ("admission_cache_misses", "Questions about images that a registry was asked"),
];

/// What images are judged by, as the configuration has it. `cluster` is the one that policies are to be taken of.
pub fn judge(config: &Config, clock: &Clock, metrics: Option<&Metrics>, cluster: Option<&str>) -> anyhow::Result<Judge> {
    let settings = &config.admission;
    let policies = Policies::new(config.policies.iter().cloned(), cluster)?;
    let asked: BTreeSet<&str> = policies.all().iter().flat_map(|bound| &bound.policy.witnesses).map(String::as_str).collect();
    let witnesses = config.witnesses.iter().filter(|witness| asked.contains(witness.name.as_str()));
    let witnesses = witnesses.map(|witness| public_keys(config, witness)).collect::<anyhow::Result<_>>()?;
    let logins = settings.docker_config.as_deref().map(DockerConfig::read).transpose()?.unwrap_or_default();
    let registries = config.registries.iter().map(|registry| {
        let login = logins.login(&registry.name).cloned();
        Ok((registry.name.clone(), open_registry(registry, login, settings.deadline, metrics)?))
    });
    let examiner = Examiner::new(ExaminerSettings {
        registries: registries.collect::<anyhow::Result<_>>()?,
        witnesses,
        entries: settings.cache.entries,
        keep: settings.cache.keep,
        clock: clock.clone(),
    });
    let kinds = settings
        .kinds
        .iter()
        .map(|custom| (GroupKind { group: custom.group.clone(), kind: custom.kind.clone() }, custom.paths.clone()));
    Ok(Judge {
        policies,
        allow: Patterns::parse(&settings.allow).map_err(|problem| anyhow!(problem).context("[admission] allow"))?,
        kinds: Kinds::new(kinds),
        examiner,
        breakglass: settings.breakglass.clone(),
        daemon: settings.daemon.as_ref().map(Daemon::new).transpose().context("[admission] daemon cannot be used")?,
        clock: clock.clone(),
    })
}

/// Public keys are all that there is to be: no KMS is ever asked from here.
fn public_keys(config: &Config, witness: &config::Witness) -> anyhow::Result<Known> {
    known(config, witness).map_err(|error| match error.downcast_ref() {
        Some(witness::Error::NoKeyOffline { witness, key }) => anyhow!(
            "witness {witness}: its key is in a KMS ({key}), which is not asked here: write public_key = \"{witness}.pub.pem\" into its \
             [[witness]]; `countersign witness public-key {witness}` prints that file, where the KMS can be asked"
        ),
        _ => error,
    })
}

fn open_registry(
    registry: &config::Registry,
    login: Option<Credentials>,
    deadline: Duration,
    metrics: Option<&Metrics>,
) -> anyhow::Result<Registry> {
    let mut settings = registry_settings(registry, metrics)?;
    settings.credentials = settings.credentials.or(login);
    // Who waits longer than a review may take waits for nobody.
    settings.timeouts =
        Timeouts { connect: settings.timeouts.connect.min(deadline), request: settings.timeouts.request.min(deadline) };
    Ok(Registry::new(settings)?)
}

/// Runs until it is told to stop.
pub async fn serve(path: PathBuf, config: Config, log: LogHandle) -> anyhow::Result<ExitCode> {
    let clock = Clock::system();
    let lifecycle = Lifecycle::install(config.server.grace)?;
    let metrics = Metrics::new();
    let settings = &config.admission;
    let judge = judge(&config, &clock, Some(&metrics), settings.cluster.as_deref())?;
    info!(
        policies = judge.policies.all().len(),
        cluster = settings.cluster.as_deref().unwrap_or("(not named)"),
        "policies are in force"
    );
    let webhook = Arc::new(Webhook::new(judge, settings.deadline, metrics.clone()));
    attach_counters(&metrics, &webhook);
    let serving = Serving::open(&settings.certificate, &clock)?;
    let tls = serving.issue()?;
    let server = Server::bind(settings.listen, limits(&config.server), Some(tls.clone())).await?;
    let address = server.local_addr();
    attach_refused(&metrics, [("admission", server.counters())]);
    // That a registry is away must not take the webhook out of service: it still knows what verified, and says why else.
    let router = admission::router(webhook.clone()).merge(Arc::new(Readiness::new()).router()).merge(metrics_route(&metrics));
    let grace = config.server.grace;
    lifecycle.spawn("http", in_time(lifecycle.drain(), grace, server.serve(router, lifecycle.drain(), lifecycle.abort())));
    lifecycle.spawn("certificate", serving.renew(tls, lifecycle.reload(), lifecycle.drain()));
    if let Some(kubernetes) = &settings.kubernetes
        && let Some(recheck) = kubernetes.recheck
    {
        let looks = Arc::<Looks>::default();
        let read = looks.clone();
        metrics.attach_gauges(Looks::FAMILIES, move || read.samples());
        let rounds = Rounds {
            cluster: Cluster::open(kubernetes).await?,
            webhook: webhook.clone(),
            settings: recheck,
            patience: settings.deadline,
            looks,
            clock: clock.clone(),
            known: HashSet::new(),
        };
        lifecycle.spawn("recheck", rounds.run(lifecycle.drain()));
    }
    let mut reloader = Reloader { path, config, clock, webhook, metrics, log };
    let (drain, mut asked) = (lifecycle.drain(), lifecycle.reload());
    lifecycle.spawn("reload", async move {
        while let Some(Ok(())) = drain.run_until_cancelled(asked.changed()).await {
            reloader.reload();
        }
    });
    info!(version = env!("CARGO_PKG_VERSION"), address = address.map(tracing::field::display), "ready: answering reviews");
    Ok(lifecycle.run().await)
}

/// PEM: what the API server has to trust, for the `caBundle` of the webhooks.
pub fn ca_bundle(config: &Config, clock: &Clock) -> anyhow::Result<String> {
    match &config.admission.certificate {
        Certificate::Own { folder, .. } => Ok(Authority::open(folder, clock.now())?.bundle().to_owned()),
        Certificate::Files(_) => Err(crate::cli::Usage(
            "the certificate is read from files ([admission] tls): whoever made it has the authority's, too".to_owned(),
        )
        .into()),
    }
}

fn attach_counters(metrics: &Metrics, webhook: &Arc<Webhook>) {
    let counters: Arc<Counters> = webhook.counters();
    metrics.attach(admission::FAMILIES, move || counters.samples());
    let webhook = webhook.clone();
    metrics.attach(REMEMBERED, move || {
        let (hits, misses) = webhook.judge().examiner.counts();
        let values = [hits, misses];
        let sample = |((name, _), value): (&(&'static str, &str), u64)| Sample { name, labels: vec![], value };
        REMEMBERED.iter().zip(values).map(sample).collect()
    });
}

fn metrics_route(metrics: &Metrics) -> Router {
    let metrics = metrics.clone();
    Router::new().route("/metrics", get(move || async move { ([(CONTENT_TYPE, METRICS_TYPE)], metrics.render(None)) }))
}

/// Puts a changed configuration into force as a whole, or not at all.
struct Reloader {
    path: PathBuf,
    config: Config,
    clock: Clock,
    webhook: Arc<Webhook>,
    metrics: Metrics,
    log: LogHandle,
}

impl Reloader {
    fn reload(&mut self) {
        let result = self.try_reload();
        self.metrics.config_reloaded(result.is_ok());
        let config = self.path.display();
        match result {
            Ok(policies) => info!(%config, policies, "the configuration was read again and is in force"),
            Err(error) => error!(
                %config,
                error = format!("{error:#}"),
                "the configuration was read again and cannot be used: everything stays as it was"
            ),
        }
    }

    fn try_reload(&mut self) -> anyhow::Result<usize> {
        let (config, warnings) = Config::load(&self.path)?;
        for warning in &warnings {
            tracing::warn!("{warning}");
        }
        let of_start = |config: &Config| {
            let admission = &config.admission;
            // A certificate in files is looked at anyway.
            let certificate = match &admission.certificate {
                Certificate::Files(files) => (files.certificate.clone(), vec![]),
                Certificate::Own { folder, names } => (folder.clone(), names.clone()),
            };
            (admission.listen, certificate, admission.deadline)
        };
        if of_start(&config) != of_start(&self.config) || fixed(&config.server) != fixed(&self.config.server) {
            return Err(anyhow!(
                "[server], and `listen`, `tls` and `deadline` of [admission], cannot be changed while it runs: restart it"
            ));
        }
        let judge = judge(&config, &self.clock, Some(&self.metrics), config.admission.cluster.as_deref())?;
        let policies = judge.policies.all().len();
        // Nothing below can fail.
        if let Err(error) = self.log.set_filter(&config.log.level.to_string()) {
            tracing::warn!(error = &error as &dyn std::error::Error, "the log level stays as it was");
        }
        self.webhook.replace(judge);
        self.config = config;
        Ok(policies)
    }
}
