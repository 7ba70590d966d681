//! Builds everything from a `Config`. The only place that names every module.

mod admission;
mod daemon;
mod recheck;
mod serving;
mod witnesses;

use std::{collections::HashMap, fs, os::unix::fs::DirBuilderExt as _, path::Path, sync::Arc};

use anyhow::{Context as _, anyhow};
use queue::{
    Amqp, Embedded, Options, Queue,
    amqp::{self, Feed},
};
use secrecy::ExposeSecret as _;
use tokio_util::task::TaskTracker;
use tracing::{error, warn};

use crate::{
    admin::{self, Admin},
    cli::Client,
    clock::Clock,
    config::{self, Backend, Config},
    intake,
    ledger::Ledger,
    oci::RegistryName,
    outcome::{Classify as _, Verdict},
    pipeline::{Patience, Pipeline, Setup},
    registry::{self, Registry},
    rule::{self, Rules, Scope, TagFilter},
    telemetry::Metrics,
};

pub use admission::{ca_bundle, judge, serve as serve_admission};
pub use daemon::serve;
pub use recheck::look_at_what_runs;
pub use witnesses::{
    Unopened, Unready, certificates, check_certificate, known, known_by, probe, public_key, remote_witness, with_certificates,
};
use witnesses::{algorithms_of, open_witness, open_witnesses};

/// The state folder: queue, ledger, socket, pinned keys.
#[must_use]
pub fn state_folder(config: &Config) -> &Path {
    config.queue.backend.path()
}

/// The client of a configured registry.
pub fn registry_of(config: &Config, name: &RegistryName) -> anyhow::Result<Registry> {
    let registry = config.registries.iter().find(|registry| registry.name == *name).ok_or_else(|| {
        let known: Vec<_> = config.registries.iter().map(|registry| registry.name.as_str()).collect();
        crate::cli::Usage(format!("no [[registry]] is named {name}; the configuration has {}", known.join(", ")))
    })?;
    open_registry(registry, None)
}

fn open_registry(registry: &config::Registry, metrics: Option<&Metrics>) -> anyhow::Result<Registry> {
    Ok(Registry::new(registry_settings(registry, metrics)?)?)
}

fn registry_settings(registry: &config::Registry, metrics: Option<&Metrics>) -> anyhow::Result<registry::Settings> {
    let observer = metrics.map(|metrics| {
        let (metrics, name) = (metrics.clone(), registry.name.to_string());
        let observe = move |operation, result, took| metrics.registry_asked(&name, operation, result, took);
        Arc::new(observe) as registry::Observer
    });
    let ca = registry
        .ca
        .as_ref()
        .map(|path| fs::read(path).with_context(|| format!("{}: cannot be read", path.display())))
        .transpose()?;
    Ok(registry::Settings {
        name: registry.name.clone(),
        url: registry.url.clone(),
        credentials: registry.login.as_ref().map(|login| registry::Credentials {
            username: login.username.clone(),
            password: login.password.expose().to_owned().into(),
        }),
        ca,
        timeouts: registry::Timeouts::default(),
        observer,
    })
}

/// The rules, ready to be looked up.
pub fn rules(config: &Config) -> anyhow::Result<Rules> {
    let rule = |rule: &config::Rule| -> Result<rule::Rule, String> {
        Ok(rule::Rule {
            name: rule.name.clone(),
            registry: rule.registry.clone(),
            scope: Scope::parse(rule.scope.as_str())?,
            exclude: rule.exclude.iter().map(|scope| Scope::parse(scope.as_str())).collect::<Result<_, _>>()?,
            tags: (!rule.tags.is_empty()).then(|| TagFilter::parse(&rule.tags)).transpose()?,
            created: rule.created,
            witness: rule.witness.clone(),
            algorithm: rule.algorithm,
            signature_type: rule.signature_type,
            trigger: rule.trigger,
            formats: rule.formats.clone(),
            expiry: rule.expiry,
            untagged: rule.untagged,
            enabled: rule.enabled,
        })
    };
    let parsed: Result<Vec<_>, _> = config.rules.iter().map(rule).collect();
    parsed.and_then(Rules::new).map_err(|error| anyhow!(error).context("the rules cannot be used"))
}

/// Everything that the pipeline looks up. Witnesses that a KMS outage keeps shut are returned beside it; one that can never
/// be opened as things stand is an error.
pub async fn setup(config: &Config, ledger: &Ledger, clock: &Clock, metrics: &Metrics) -> anyhow::Result<(Setup, Vec<Unopened>)> {
    let registries =
        config.registries.iter().map(|registry| Ok((registry.name.clone(), open_registry(registry, Some(metrics))?)));
    let registries = registries.collect::<anyhow::Result<HashMap<_, _>>>()?;
    let rules = rules(config)?;
    let (witnesses, unopened) = open_witnesses(config, ledger, clock, metrics).await?;
    let mut shut = vec![];
    for (witness, error) in unopened {
        match error.verdict() {
            Verdict::Retry { .. } => {
                warn!(
                    witness = witness.name,
                    error = &error as &dyn std::error::Error,
                    "a key cannot be opened for now; what it signs waits"
                );
                shut.push((witness, error));
            }
            Verdict::Refuse { cure } => return Err(anyhow::Error::from(error).context(cure)),
            Verdict::Poison => return Err(error.into()),
        }
    }
    let names = shut.iter().map(|(witness, _): &Unopened| witness.name.clone()).collect();
    Ok((Setup { registries, witnesses, rules, shut: names }, shut))
}

/// The doors.
#[must_use]
pub fn sources(config: &Config) -> Vec<intake::Source> {
    let source = |source: &config::Source| intake::Source {
        name: source.name.clone(),
        kind: match source.kind {
            config::SourceKind::Distribution => intake::Kind::Distribution,
            config::SourceKind::CloudEvents => intake::Kind::CloudEvents,
        },
        registry: source.registry.clone(),
        auth: match &source.auth {
            config::SourceAuth::Bearer { token, token_old } => intake::Auth::Bearer {
                tokens: [Some(token), token_old.as_ref()]
                    .into_iter()
                    .flatten()
                    .map(|token| token.expose().to_owned().into())
                    .collect(),
            },
            config::SourceAuth::Nobody => intake::Auth::Bearer { tokens: vec![] },
            config::SourceAuth::Basic(login) => {
                intake::Auth::Basic { username: login.username.clone(), password: login.password.expose().to_owned().into() }
            }
        },
    };
    config.sources.iter().map(source).collect()
}

/// The brokers' queues that events come in by, each with its source's name.
fn feeds(config: &Config) -> Vec<(String, Feed)> {
    let feed = |source: &config::Source| {
        let queue = source.queue.clone()?;
        let (url, tls) = (queue.url, queue.tls);
        let feed = Feed {
            access: Arc::new(move || access(&url, &tls)),
            queue: queue.name,
            exchange: queue.exchange.map(|exchange| (exchange, queue.routing_key)),
            window: queue.prefetch,
            name: format!("countersign source {}", source.name),
        };
        Some((source.name.clone(), feed))
    };
    config.sources.iter().filter_map(feed).collect()
}

fn patience(config: &Config) -> Patience {
    let retry = config.queue.retry;
    Patience { first: retry.first, longest: retry.longest, give_up: retry.give_up }
}

/// Tasks of the queue run on `tracker`. Who does not `consume` leaves what is on a broker to the replicas.
async fn open_queue(config: &Config, clock: &Clock, tracker: &TaskTracker, consume: bool) -> anyhow::Result<Arc<dyn Queue>> {
    let clock = clock.clone();
    let now = move || clock.now();
    match &config.queue.backend {
        Backend::Embedded { path } => {
            let config::Queue { history, history_size: history_bytes, .. } = config.queue;
            Ok(Arc::new(Embedded::open(path, Options { history, history_bytes, ..Options::new(now) })?))
        }
        Backend::Amqp(amqp) => {
            // The socket and the ledger are in it; the embedded queue makes its own.
            let folder = fs::DirBuilder::new().recursive(true).mode(0o700).create(&amqp.path);
            folder.with_context(|| format!("{}: cannot be created", amqp.path.display()))?;
            let brokers = amqp.clone();
            let options = amqp::Options {
                prefix: amqp.prefix.clone(),
                partitions: amqp.partitions,
                history: config.queue.history,
                consume,
                // Commands do not wait for a broker to come back.
                unanswered: consume.then(|| amqp.path.join("unanswered.db")),
                ..amqp::Options::new(move || access(&brokers.url, &brokers.tls), replica_name(), now)
            };
            let in_flight = u16::try_from(config.queue.in_flight).unwrap_or(u16::MAX);
            let options = amqp::Options { window: options.window.max(in_flight), ..options };
            Ok(Arc::new(Amqp::open(options, tracker).await?))
        }
    }
}

/// How the brokers are reached now.
fn access(url: &config::Secret, tls: &config::BrokerTls) -> Result<amqp::Access, String> {
    let read = |path: &Path| fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
    let urls = url.again()?;
    let identity = tls.identity.as_ref();
    Ok(amqp::Access {
        urls: urls.expose_secret().split([',', ' ', '\n']).filter(|url| !url.is_empty()).map(Into::into).collect(),
        ca: tls.ca.as_deref().map(read).transpose()?,
        identity: identity.map(|(certificate, key)| Ok::<_, String>((read(certificate)?, key.again()?))).transpose()?,
    })
}

/// This process, as the other replicas and an administrator know it: `HOST-PID`.
fn replica_name() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = if host.trim().is_empty() { "countersign" } else { host.trim() };
    format!("{host}-{}", std::process::id())
}

/// A database that cannot be reached for now is a warning; one that will not have us as things stand is an error.
async fn open_ledger(config: &Config, clock: &Clock) -> anyhow::Result<Ledger> {
    let ledger = match &config.ledger {
        config::Ledger::Sqlite { path } => Ledger::open(path, clock.clone())?,
        config::Ledger::Postgres(settings) => Ledger::connect((**settings).clone(), clock.clone())?,
    };
    match ledger.check().await {
        Err(error) if !matches!(error.verdict(), Verdict::Retry { .. }) => Err(error.into()),
        Err(error) => {
            warn!(error = &error as &dyn std::error::Error, "the ledger is away for now; what has to be on record waits for it");
            Ok(ledger)
        }
        Ok(()) => Ok(ledger),
    }
}

/// The administrator's API: the running daemon's, or, when none runs, one on the files. `signing` also opens the keys then.
pub async fn client(config: &Config, clock: &Clock, signing: bool) -> anyhow::Result<Client> {
    if let Some(client) = Client::daemon(state_folder(config)).await? {
        return Ok(client);
    }
    let queue = open_queue(config, clock, &TaskTracker::new(), false).await?;
    let ledger = open_ledger(config, clock).await?;
    let pipeline = if signing {
        let metrics = Metrics::new();
        let (setup, shut) = setup(config, &ledger, clock, &metrics).await?;
        if let Some((witness, error)) = shut.into_iter().next() {
            error!(witness = witness.name, "its key cannot be opened");
            return Err(error.into());
        }
        Some(Arc::new(Pipeline::new(setup, ledger.clone(), metrics, clock.clone(), patience(config))))
    } else {
        None
    };
    Ok(Client::Here(admin::router(Admin { queue, ledger, pipeline, rules: Arc::new(rules(config)?), clock: clock.clone() })))
}

/// Whether the queue can be used, by the running daemon or from here.
pub async fn reach_queue(config: &Config, clock: &Clock) -> anyhow::Result<()> {
    if let Backend::Embedded { path } = &config.queue.backend
        && !path.exists()
    {
        // The daemon makes it; whoever checks may be somebody else, whose folder it could not use.
        let parent = path.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
        let is_folder = fs::metadata(parent).with_context(|| format!("{}: cannot be looked at", parent.display()))?.is_dir();
        return is_folder.then_some(()).with_context(|| format!("{}: is no folder", parent.display()));
    }
    let client = client(config, clock, false).await?;
    client.get::<_, admin::QueueStatus>("/api/v1/queue", &()).await.map(drop)
}

/// Whether each broker's queue that events come in by is there, with its name.
pub async fn reach_feeds(config: &Config) -> Vec<(String, anyhow::Result<()>)> {
    let mut reached = vec![];
    for (source, feed) in feeds(config) {
        reached.push((format!("queue {} of source {source}", feed.queue), feed.look().await.map_err(anyhow::Error::from)));
    }
    reached
}
