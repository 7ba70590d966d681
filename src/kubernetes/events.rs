//! Events of `events.k8s.io/v1`: what people see with `kubectl describe` and `kubectl get events`.
//!
//! Nobody waits for one: they are queued, the queue has a bound, and what does not fit or cannot be sent is counted.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{Api, api::PostParams};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use uuid::Uuid;

use super::{Cluster, Error, is_name};
use crate::{clock::Clock, telemetry::Sample};

/// What is counted, for [`crate::telemetry::Metrics::attach`].
pub const FAMILIES: &[(&str, &str)] =
    &[("kubernetes_events", "Events for the cluster: sent, failed (the API did not take it), dropped (too many waited)")];

/// Events that wait to be sent.
const WAITING: usize = 256;
/// How long what still waits may take at the end.
const LAST: Duration = Duration::from_secs(3);
/// Bytes; the API takes 1024.
const LONGEST_NOTE: usize = 1000;

/// What happened, and to which object.
#[derive(Debug, Clone)]
pub struct Notice {
    /// Its namespace must be set, and is where the Event is put.
    pub regarding: ObjectReference,
    /// One word in CamelCase: `Breakglass`.
    pub reason: &'static str,
    /// What was done about it, in one word: `Admitted`.
    pub action: &'static str,
    /// For people. It is cut where it is too long.
    pub note: String,
    /// What it is about, in a word that a name may have: as long as the cluster has an Event of it, there is no second one, whichever
    /// replica tells. None: it is told each time.
    pub once: Option<String>,
}

/// Takes notices for the cluster. Clones share the queue.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<Notice>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
}

/// Sends what was reported, as long as it runs.
pub struct Sender {
    queue: mpsc::Receiver<Notice>,
    counts: Arc<Counts>,
    cluster: Cluster,
    clock: Clock,
    /// This process, as Events name it.
    instance: String,
}

/// Events of `instance`, and what sends them.
#[must_use]
pub fn events(cluster: Cluster, clock: Clock, instance: String) -> (Events, Sender) {
    let (sender, receiver) = mpsc::channel(WAITING);
    let counts = Arc::<Counts>::default();
    (Events { queue: sender, counts: counts.clone() }, Sender { queue: receiver, counts, cluster, clock, instance })
}

impl Events {
    /// Never waits. What comes faster than it can be sent is dropped, and counted; so is what is in no namespace.
    pub fn report(&self, notice: Notice) {
        let is_somewhere = notice.regarding.namespace.as_deref().is_some_and(is_name);
        if !is_somewhere || self.queue.try_send(notice).is_err() {
            self.counts.dropped.fetch_add(1, Relaxed);
        }
    }

    #[must_use]
    pub fn samples(&self) -> Vec<Sample> {
        let Counts { sent, failed, dropped } = &*self.counts;
        let of = |result: &str, count: &AtomicU64| Sample {
            name: FAMILIES[0].0,
            labels: vec![("result", result.to_owned())],
            value: count.load(Relaxed),
        };
        vec![of("sent", sent), of("failed", failed), of("dropped", dropped)]
    }
}

impl Sender {
    /// Until `drain`, and then what still waits, if that is quick.
    pub async fn run(mut self, drain: CancellationToken) {
        while let Some(Some(notice)) = drain.run_until_cancelled(self.queue.recv()).await {
            self.send(notice).await;
        }
        self.queue.close();
        let end = Instant::now() + LAST;
        while let Ok(Some(notice)) = timeout_at(end, self.queue.recv()).await {
            if timeout_at(end, self.send(notice)).await.is_err() {
                break;
            }
        }
    }

    async fn send(&self, notice: Notice) {
        let namespace = notice.regarding.namespace.clone().unwrap_or_default();
        let event = event(notice, &self.clock, &self.instance);
        let api: Api<Event> = Api::namespaced(self.cluster.client(), &namespace);
        match self.cluster.ask(api.create(&PostParams::default(), &event)).await {
            // With 409, it was told already.
            Ok(_) | Err(Error::Refused { code: 409, .. }) => self.counts.sent.fetch_add(1, Relaxed),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                warn!(namespace, reason = event.reason, error, "an Event could not be written");
                self.counts.failed.fetch_add(1, Relaxed)
            }
        };
    }
}

fn event(notice: Notice, clock: &Clock, instance: &str) -> Event {
    let mut note = notice.note;
    if note.len() > LONGEST_NOTE {
        while note.len() > LONGEST_NOTE {
            note.pop();
        }
        note.push('…');
    }
    Event {
        metadata: ObjectMeta {
            name: Some(format!("countersign.{}", notice.once.unwrap_or_else(|| Uuid::now_v7().simple().to_string()))),
            namespace: notice.regarding.namespace.clone(),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(clock.now())),
        reporting_controller: Some(format!("{}/admission", super::GROUP)),
        reporting_instance: Some(instance.chars().take(128).collect()),
        action: Some(notice.action.to_owned()),
        reason: Some(notice.reason.to_owned()),
        type_: Some("Warning".to_owned()),
        regarding: Some(notice.regarding),
        note: Some(note),
        ..Event::default()
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("counts", &self.counts).finish_non_exhaustive()
    }
}
