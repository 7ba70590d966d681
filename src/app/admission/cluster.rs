//! What the webhook has of its cluster's API: the resources that it follows, the secrets that it reads, the Events that it
//! writes. All of it runs beside the reviews, and none of them waits for it but to read a secret.

use std::{collections::HashSet, error::Error, future::ready, sync::Arc, time::Duration};

use futures::{FutureExt as _, StreamExt as _, stream};
use kube::{
    Api,
    api::{DynamicObject, Patch, PatchParams},
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    admission::{Kept, PullSecrets, ResourceKind, State},
    cli::Usage,
    clock::Clock,
    config,
    http::Readiness,
    kubernetes::{self, Cluster, EVENT_FAMILIES, Events, Seen, events, follow, list},
    lifecycle::Lifecycle,
    telemetry::{Metrics, Sample},
};

/// The way to the cluster's API. It is asked nothing yet, so what is wrong is what was written.
pub(in crate::app) async fn reach(settings: &config::Kubernetes) -> Result<Cluster, Usage> {
    // What `kube` says repeats what it was caused by.
    let with_cause = |error: &dyn Error| error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"));
    Cluster::open(settings).await.map_err(|error| Usage(with_cause(&error)))
}

/// Gauges.
const FAMILIES: &[(&str, &str)] = &[
    ("admission_resources", "SecurityPolicy and Witness resources by their condition: ready, or refused"),
    (
        "admission_resources_lost_seconds",
        "How long the cluster's API could not be asked for the resources of a kind; 0 while they are watched",
    ),
];
/// The check of `/readyz`.
const CHECK: &str = "resources";
/// Statuses that are written at once.
const AT_ONCE: usize = 8;
/// How long after a status that could not be written it is tried again.
const AGAIN: Duration = Duration::from_secs(30);

/// What was opened of it, as the configuration has it.
pub(super) struct OfCluster {
    cluster: Cluster,
    pull_secrets: Option<PullSecrets>,
    events: Option<Events>,
    followed: Option<Followed>,
}

type Told = Option<Arc<Vec<State>>>;

/// The resources of both kinds, and what they are to be told.
#[derive(Clone)]
struct Followed {
    policies: watch::Receiver<Seen>,
    witnesses: watch::Receiver<Seen>,
    /// What became of those that are in force. None: they were not read yet.
    states: watch::Sender<Told>,
    clock: Clock,
}

impl OfCluster {
    /// None if nothing is to be asked of it. Does not wait for it.
    pub(super) async fn open(
        settings: Option<&config::Kubernetes>,
        clock: &Clock,
        metrics: &Metrics,
        lifecycle: &Lifecycle,
    ) -> Result<Option<Self>, Usage> {
        let Some(settings) = settings else { return Ok(None) };
        let cluster = reach(settings).await?;
        let events = settings.events.then(|| {
            let (events, sender) = events(cluster.clone(), clock.clone(), super::super::replica_name());
            lifecycle.spawn("events", sender.run(lifecycle.drain()));
            let counted = events.clone();
            metrics.attach(EVENT_FAMILIES, move || counted.samples());
            events
        });
        let followed = settings.resources.then(|| Followed::begin(&cluster, clock, lifecycle));
        if let Some(followed) = followed.clone() {
            metrics.attach_gauges(FAMILIES, move || followed.samples());
        }
        Ok(Some(Self { events, followed, ..Self::once(cluster, settings) }))
    }

    /// What there is of it without anything that runs.
    pub(super) fn once(cluster: Cluster, settings: &config::Kubernetes) -> Self {
        let pull_secrets = settings.pull_secrets.then(|| PullSecrets::new(cluster.clone()));
        Self { cluster, pull_secrets, events: None, followed: None }
    }

    pub(super) fn cluster(&self) -> Cluster {
        self.cluster.clone()
    }

    pub(super) fn pull_secrets(&self) -> Option<PullSecrets> {
        self.pull_secrets.clone()
    }

    pub(super) fn events(&self) -> Option<Events> {
        self.events.clone()
    }

    /// What was seen last of the resources; None if they are not followed.
    pub(super) fn kept(&self) -> Option<Kept> {
        let followed = self.followed.as_ref()?;
        let objects = |seen: &watch::Receiver<Seen>| seen.borrow().objects.clone();
        Some(Kept { policies: objects(&followed.policies), witnesses: objects(&followed.witnesses) })
    }

    /// Waits until they are others.
    pub(super) async fn changed(&mut self) {
        let Some(followed) = &mut self.followed else { return std::future::pending().await };
        let changed = tokio::select! {
            changed = followed.policies.changed() => changed,
            changed = followed.witnesses.changed() => changed,
        };
        if changed.is_err() {
            // Nobody follows any more: the process ends.
            std::future::pending::<()>().await;
        }
    }

    /// Now that they are in force: has each resource's status say what became of it, and the log of those that cannot be used, once.
    pub(super) fn tell(&self, states: Option<Vec<State>>) {
        fn refused(states: &[State]) -> impl Iterator<Item = (&'static str, &str, &str)> {
            let refused = states.iter().filter(|state| !state.is_ready);
            refused.map(|state| (state.kind.name(), state.name(), state.message.as_str()))
        }
        let (Some(followed), Some(states)) = (&self.followed, states) else { return };
        let told = followed.states.borrow().clone().unwrap_or_default();
        let told: HashSet<_> = refused(&told).collect();
        for (kind, name, problem) in refused(&states).filter(|problem| !told.contains(problem)) {
            warn!(kind, name, problem, "a resource of the cluster cannot be used");
        }
        followed.states.send_replace(Some(Arc::new(states)));
    }

    /// Ready once the resources have been read. That they cannot be read any more takes nobody out of service.
    pub(super) fn readiness(&self, readiness: Readiness) -> Readiness {
        let Some(followed) = &self.followed else { return readiness };
        let (read, lost) = (followed.clone(), followed.clone());
        readiness
            .check(CHECK, move || {
                let unread = read.each().find(|(_, seen)| seen.objects.is_none());
                let unread = unread.map(|(kind, seen)| {
                    let why = seen.lost.map(|lost| format!(": {}", lost.why)).unwrap_or_default();
                    format!("the {} resources have not been read yet{why}", kind.name())
                });
                let waits = || read.states.borrow().is_none().then(|| "the resources are not in force yet".to_owned());
                ready(unread.or_else(waits).map_or(Ok(()), Err))
            })
            .note(CHECK, move || {
                let lost = lost.each().find_map(|(kind, seen)| Some((kind, seen.lost?)));
                lost.map(|(kind, lost)| format!("{} resources are as they were at {}: {}", kind.name(), lost.since, lost.why))
            })
    }
}

impl Followed {
    fn begin(cluster: &Cluster, clock: &Clock, lifecycle: &Lifecycle) -> Self {
        let watched = |kind: ResourceKind| {
            let (sender, receiver) = watch::channel(Seen::default());
            let task = follow(cluster.clone(), kind.api_resource(), clock.clone(), sender);
            let drain = lifecycle.drain();
            lifecycle.spawn(kind.plural(), async move {
                drain.run_until_cancelled(task).await;
            });
            receiver
        };
        let (policies, witnesses) = (watched(ResourceKind::SecurityPolicy), watched(ResourceKind::Witness));
        let (states, told) = watch::channel(None);
        lifecycle.spawn("statuses", write_statuses(cluster.clone(), clock.clone(), told, lifecycle.drain()));
        Self { policies, witnesses, states, clock: clock.clone() }
    }

    fn each(&self) -> impl Iterator<Item = (ResourceKind, Seen)> {
        let seen = [&self.policies, &self.witnesses].map(|seen| seen.borrow().clone());
        ResourceKind::ALL.into_iter().zip(seen)
    }

    fn samples(&self) -> Vec<Sample> {
        let now = self.clock.now();
        let lost = self.each().map(|(kind, seen)| {
            let seconds = seen.lost.map_or(0, |lost| now.duration_since(lost.since).as_secs());
            Sample { name: FAMILIES[1].0, labels: vec![("kind", kind.name().to_owned())], value: seconds.try_into().unwrap_or(0) }
        });
        let states = self.states.borrow().clone().unwrap_or_default();
        let counts = ResourceKind::ALL.into_iter().flat_map(|kind| {
            [(true, "ready"), (false, "refused")].map(|(is_ready, word)| {
                let count = states.iter().filter(|state| state.kind == kind && state.is_ready == is_ready).count();
                let labels = vec![("kind", kind.name().to_owned()), ("state", word.to_owned())];
                Sample { name: FAMILIES[0].0, labels, value: count as u64 }
            })
        });
        counts.chain(lost).collect()
    }
}

/// The resources as they are now.
pub(super) async fn read(cluster: &Cluster) -> Result<Kept, kubernetes::Error> {
    let of = async |kind: ResourceKind| list(cluster, &kind.api_resource()).await.map(|objects| Some(Arc::new(objects)));
    Ok(Kept { policies: of(ResourceKind::SecurityPolicy).await?, witnesses: of(ResourceKind::Witness).await? })
}

/// Writes what is to be said and is not said yet, and the newest only.
async fn write_statuses(cluster: Cluster, clock: Clock, mut told: watch::Receiver<Told>, drain: CancellationToken) {
    loop {
        let states = told.borrow_and_update().clone().unwrap_or_default();
        let writes: Vec<_> = states.iter().map(|state| write_status(&cluster, &clock, state).boxed()).collect();
        let written = stream::iter(writes).buffer_unordered(AT_ONCE).take_until(drain.cancelled());
        let failed: Vec<_> = written.filter_map(|written| ready(written.err())).collect().await;
        if let Some(error) = failed.first() {
            let error = error as &dyn std::error::Error;
            warn!(statuses = failed.len(), error, "statuses of resources could not be written, and are tried again");
        }
        let changed = async {
            if !failed.is_empty() {
                drop(timeout(AGAIN, told.changed()).await);
            } else if told.changed().await.is_err() {
                sleep(AGAIN).await;
            }
        };
        if drain.run_until_cancelled(changed).await.is_none() {
            return;
        }
    }
}

async fn write_status(cluster: &Cluster, clock: &Clock, state: &State) -> Result<(), kubernetes::Error> {
    let Some(patch) = state.patch(clock.now()) else { return Ok(()) };
    let api: Api<DynamicObject> = Api::all_with(cluster.client(), &state.kind.api_resource());
    let (parameters, patch) = (PatchParams::default(), Patch::Merge(&patch));
    match cluster.ask(api.patch_status(state.name(), &parameters, &patch)).await {
        // It was removed meanwhile.
        Err(error) if error.is_not_found() => Ok(()),
        written => written.map(drop),
    }
}
