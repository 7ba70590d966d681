//! `countersign admission`: the webhook, from a configuration to its exit code; and what the command line judges manifests by.

mod cluster;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    future::pending,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use axum::{Router, routing::get};
use http::header::CONTENT_TYPE;
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use self::cluster::OfCluster;
pub(super) use self::cluster::reach;
use super::{
    daemon::{attach_refused, fixed, in_time, limits},
    known,
    recheck::Rounds,
    registry_settings,
    serving::Serving,
};
use crate::{
    admission::{
        self, Authority, Beside, Counters, Daemon, DockerConfig, Examiner, ExaminerSettings, GroupKind, Judge, Kept, Kinds,
        Looks, Resources, State, Webhook,
    },
    clock::Clock,
    config::{self, Certificate, Config},
    http::{Readiness, Server},
    kubernetes::Cluster,
    lifecycle::Lifecycle,
    policy::{Closed, Patterns, Policies, Policy},
    registry::{Credentials, Registry, Timeouts},
    telemetry::{CONTENT_TYPE as METRICS_TYPE, LogHandle, Metrics, Sample},
    verify::Known,
    witness,
};

const REMEMBERED: &[(&str, &str)] = &[
    ("admission_cache_hits", "Questions about images that were answered from memory"),
    ("admission_cache_misses", "Questions about images that a registry was asked"),
];

/// What images are judged by, as the configuration and these resources have it; and what became of each resource. `cluster` is
/// the one that policies are to be taken of.
pub fn judge(config: &Config, clock: &Clock, cluster: Option<&str>, kept: &Kept) -> anyhow::Result<(Judge, Vec<State>)> {
    let court = Court { config, clock, metrics: None, cluster, of_cluster: None };
    let mut resources = court.resources(kept);
    let states = resources.states.take().unwrap_or_default();
    Ok((court.judge(resources, None)?, states))
}

/// The same with what the cluster has, as far as `kubernetes` says that it counts. Asked once.
pub(super) async fn judge_of(
    config: &Config,
    clock: &Clock,
    cluster: Option<&str>,
    api: &Cluster,
    settings: &config::Kubernetes,
) -> anyhow::Result<Judge> {
    let of_cluster = OfCluster::once(api.clone(), settings);
    let court = Court { config, clock, metrics: None, cluster, of_cluster: Some(&of_cluster) };
    let resources = if settings.resources { court.resources(&cluster::read(api).await?) } else { Resources::default() };
    court.judge(resources, None)
}

/// What a judge is made of.
struct Court<'a> {
    config: &'a Config,
    clock: &'a Clock,
    metrics: Option<&'a Metrics>,
    cluster: Option<&'a str>,
    of_cluster: Option<&'a OfCluster>,
}

impl Court<'_> {
    /// What the cluster's resources come to beside this configuration.
    fn resources(&self, kept: &Kept) -> Resources {
        let why = |witness| public_keys(self.config, witness).err().map(|error| format!("{error:#}"));
        let beside = Beside {
            policies: self.config.policies.iter().map(|policy| policy.name.as_str()).collect(),
            witnesses: self.config.witnesses.iter().map(|witness| (witness.name.as_str(), why(witness))).collect(),
            cluster: self.cluster,
        };
        Resources::read(kept, &beside)
    }

    /// With the examiner that there is, where it would know of the same witnesses: what it remembers is kept.
    fn judge(&self, resources: Resources, examiner: Option<Examiner>) -> anyhow::Result<Judge> {
        let settings = &self.config.admission;
        let policies = self.config.policies.iter().cloned().chain(resources.policies);
        let policies = Policies::with_closed(policies, resources.closed, self.cluster)?;
        let asked = asked(&policies);
        let examiner = if let Some(examiner) = examiner {
            examiner
        } else {
            let of_file = self.config.witnesses.iter().filter(|witness| asked.contains(&witness.name));
            let mut witnesses: Vec<Known> =
                of_file.map(|witness| public_keys(self.config, witness)).collect::<anyhow::Result<_>>()?;
            let of_cluster = resources.witnesses.into_iter().filter(|(name, _)| asked.contains(name));
            witnesses.extend(of_cluster.map(|(_, (known, _))| known));
            self.examiner(witnesses)?
        };
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
            pull_secrets: self.of_cluster.and_then(OfCluster::pull_secrets),
            events: self.of_cluster.and_then(OfCluster::events),
            clock: self.clock.clone(),
        })
    }

    fn examiner(&self, witnesses: Vec<Known>) -> anyhow::Result<Examiner> {
        let settings = &self.config.admission;
        let logins = settings.docker_config.as_deref().map(DockerConfig::read).transpose()?.unwrap_or_default();
        let registries = self.config.registries.iter().map(|registry| {
            let login = logins.login(&registry.name).cloned();
            Ok((registry.name.clone(), open_registry(registry, login, settings.deadline, self.metrics)?))
        });
        Ok(Examiner::new(ExaminerSettings {
            registries: registries.collect::<anyhow::Result<_>>()?,
            witnesses,
            entries: settings.cache.entries,
            keep: settings.cache.keep,
            clock: self.clock.clone(),
        }))
    }
}

/// The witnesses that policies want.
fn asked(policies: &Policies) -> BTreeSet<String> {
    policies.all().iter().filter(|bound| bound.refused.is_none()).flat_map(|bound| bound.policy.witnesses.clone()).collect()
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
    let of_cluster = OfCluster::open(settings.kubernetes.as_ref(), &clock, &metrics, &lifecycle).await?;
    let court = Court {
        config: &config,
        clock: &clock,
        metrics: Some(&metrics),
        cluster: settings.cluster.as_deref(),
        of_cluster: of_cluster.as_ref(),
    };
    // Nothing was read of the cluster's resources yet; as soon as it is, they are followed.
    let unread = of_cluster.as_ref().and_then(OfCluster::kept).map_or_else(Resources::default, |kept| court.resources(&kept));
    let judge = court.judge(unread, None)?;
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
    let readiness = of_cluster.iter().fold(Readiness::new(), |readiness, of_cluster| of_cluster.readiness(readiness));
    let router = admission::router(webhook.clone()).merge(Arc::new(readiness).router()).merge(metrics_route(&metrics));
    let grace = config.server.grace;
    lifecycle.spawn("http", in_time(lifecycle.drain(), grace, server.serve(router, lifecycle.drain(), lifecycle.abort())));
    lifecycle.spawn("certificate", serving.renew(tls, lifecycle.reload(), lifecycle.drain()));
    if let Some(of_cluster) = &of_cluster
        && let Some(recheck) = settings.kubernetes.as_ref().and_then(|kubernetes| kubernetes.recheck)
    {
        let looks = Arc::<Looks>::default();
        let read = looks.clone();
        metrics.attach_gauges(Looks::FAMILIES, move || read.samples());
        let rounds = Rounds {
            cluster: of_cluster.cluster(),
            webhook: webhook.clone(),
            settings: recheck,
            patience: settings.deadline,
            looks,
            clock: clock.clone(),
            known: HashSet::new(),
        };
        lifecycle.spawn("recheck", rounds.run(lifecycle.drain()));
    }
    let reloader = Reloader { path, config, clock, webhook, metrics, log, of_cluster, in_force: None };
    lifecycle.spawn("reload", reloader.run(lifecycle.drain(), lifecycle.reload()));
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

/// Puts a changed configuration into force as a whole, or not at all; and the cluster's resources as they change.
struct Reloader {
    path: PathBuf,
    config: Config,
    clock: Clock,
    webhook: Arc<Webhook>,
    metrics: Metrics,
    log: LogHandle,
    of_cluster: Option<OfCluster>,
    /// What of the cluster's resources is in force. None: it is to be put into force, whatever it is.
    in_force: Option<InForce>,
}

/// What of the cluster's resources a judge is made of.
#[derive(PartialEq)]
struct InForce {
    policies: Vec<Policy>,
    closed: Vec<Closed>,
    /// The witnesses that any policy wants, with the `spec` that one was read from if it is a resource.
    witnesses: BTreeMap<String, Option<Value>>,
}

impl Reloader {
    async fn run(mut self, drain: CancellationToken, mut asked: watch::Receiver<u64>) {
        loop {
            let resources = async {
                match &mut self.of_cluster {
                    Some(of_cluster) => of_cluster.changed().await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = drain.cancelled() => return,
                () = resources => self.follow(),
                changed = asked.changed() => match changed {
                    Ok(()) => self.reload(),
                    Err(_) => return,
                },
            }
        }
    }

    fn court<'a>(&'a self, config: &'a Config) -> Court<'a> {
        Court {
            config,
            clock: &self.clock,
            metrics: Some(&self.metrics),
            cluster: config.admission.cluster.as_deref(),
            of_cluster: self.of_cluster.as_ref(),
        }
    }

    /// The resources of the cluster changed.
    fn follow(&mut self) {
        let Some(kept) = self.of_cluster.as_ref().and_then(OfCluster::kept) else { return };
        let resources = self.court(&self.config).resources(&kept);
        if let Err(error) = self.put_into_force(resources) {
            error!(error = format!("{error:#}"), "the cluster's resources cannot be put into force: everything stays as it was");
        }
    }

    /// Changes nothing where nothing but a status is new.
    fn put_into_force(&mut self, mut resources: Resources) -> anyhow::Result<()> {
        let states = resources.states.take();
        let wanted = resources.policies.iter().chain(&self.config.policies).flat_map(|policy| &policy.witnesses);
        let spec = |name: &String| resources.witnesses.get(name).map(|(_, spec)| spec.clone());
        let new = InForce {
            witnesses: wanted.map(|name| (name.clone(), spec(name))).collect(),
            policies: resources.policies.clone(),
            closed: resources.closed.clone(),
        };
        if self.in_force.as_ref() != Some(&new) {
            let knows_them = self.in_force.as_ref().is_some_and(|old| old.witnesses == new.witnesses);
            let examiner = knows_them.then(|| self.webhook.judge().examiner.clone());
            let judge = self.court(&self.config).judge(resources, examiner)?;
            info!(policies = judge.policies.all().len(), "the cluster's resources are in force");
            self.webhook.replace(judge);
            self.in_force = Some(new);
        }
        if let Some(of_cluster) = &self.of_cluster {
            of_cluster.tell(states);
        }
        Ok(())
    }

    fn reload(&mut self) {
        let result = self.try_reload();
        let config = self.path.display();
        match &result {
            Ok(policies) => info!(%config, policies, "the configuration was read again and is in force"),
            Err(error) => error!(
                %config,
                error = format!("{error:#}"),
                "the configuration was read again and cannot be used: everything stays as it was"
            ),
        }
        // What is counted is in the log already.
        self.metrics.config_reloaded(result.is_ok());
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
            (admission.listen, certificate, admission.deadline, admission.kubernetes.clone())
        };
        if of_start(&config) != of_start(&self.config) || fixed(&config.server) != fixed(&self.config.server) {
            return Err(anyhow!(
                "[server], and `listen`, `tls`, `deadline` and `kubernetes` of [admission], cannot be changed while it runs: restart it"
            ));
        }
        let court = self.court(&config);
        let kept = self.of_cluster.as_ref().and_then(OfCluster::kept);
        let mut resources = kept.map_or_else(Resources::default, |kept| court.resources(&kept));
        let states = resources.states.take();
        let judge = court.judge(resources, None)?;
        let policies = judge.policies.all().len();
        // Nothing below can fail.
        if let Err(error) = self.log.set_filter(&config.log.level.to_string()) {
            tracing::warn!(error = &error as &dyn std::error::Error, "the log level stays as it was");
        }
        self.webhook.replace(judge);
        self.in_force = None;
        if let Some(of_cluster) = &self.of_cluster {
            of_cluster.tell(states);
        }
        self.config = config;
        Ok(policies)
    }
}
