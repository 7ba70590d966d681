//! The doors that push events come in by: authenticate, bound, parse, enqueue, and only then answer 202.
//!
//! No registry, rule or key is touched here, so an answer takes as long as one durable write of the queue. Senders
//! retry on 503 and on nothing else that is of use, so that an authenticated body is never answered with 4xx: what is
//! no event is queued as it is, under [`event::QUARANTINE_CONTENT_TYPE`], and the pipeline makes a dead letter of it.

mod auth;
mod cloudevents;
mod counters;
pub mod distribution;
mod entry;
mod json;
mod route;

use std::{
    collections::HashMap,
    error::Error,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use bytes::Bytes;
use http::HeaderMap;
use jiff::Timestamp;
use queue::{Message, PartitionKey, Queue};
use tracing::warn;
use uuid::Uuid;

pub use self::{
    auth::Auth,
    cloudevents::Incoming,
    counters::{Counters, Sample},
    entry::{Entry, Ignored, Parsed, Push, Refusal},
    route::router,
};
use self::{
    auth::{Accepted, presented},
    counters::{Refused, SourceCounters},
};
use crate::{
    clock::Clock,
    event::{self, PushEvent},
    oci::RegistryName,
};

/// A door as configured: `POST /events/{name}`.
#[derive(Debug, Clone)]
pub struct Source {
    pub name: String,
    pub kind: Kind,
    /// The registry that its events are about, whatever host they name.
    pub registry: RegistryName,
    pub auth: Auth,
}

/// What speaks at a door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// distribution (the Docker registry) 2.8 and 3.x.
    Distribution,
    /// Whatever sends CloudEvents of the plain form.
    CloudEvents,
}

impl Kind {
    /// Reads what came in. Pure. What a registry of this kind sends may also be the data of CloudEvents: a relay's.
    pub fn parse(self, incoming: &Incoming) -> Parsed<'_> {
        match self {
            Self::Distribution => {
                cloudevents::parse(incoming, distribution::within, false).unwrap_or_else(|| distribution::parse(&incoming.body))
            }
            Self::CloudEvents => cloudevents::parse(incoming, cloudevents::plain, true).expect("it is taken for one in any case"),
        }
    }
}

/// What the sender is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// 202: whatever was worth keeping is durable.
    Accepted { taken: usize, ignored: usize, quarantined: usize },
    /// 401: the secret is missing or wrong, or there is no such source; the two are not told apart.
    Unauthorized,
    /// 503 with `Retry-After`: nothing was kept; the same body may be accepted later.
    Unavailable,
}

/// All doors of one daemon.
pub struct Intake {
    queue: Arc<dyn Queue>,
    clock: Clock,
    doors: RwLock<HashMap<String, Arc<Door>>>,
    counters: Counters,
}

/// A source that is being listened to.
#[derive(Debug)]
pub struct Door {
    name: String,
    kind: Kind,
    registry: RegistryName,
    accepted: Accepted,
    counters: Arc<SourceCounters>,
}

impl Intake {
    #[must_use]
    pub fn new(queue: Arc<dyn Queue>, clock: Clock, sources: Vec<Source>) -> Self {
        let intake = Self { queue, clock, doors: RwLock::default(), counters: Counters::default() };
        intake.replace_sources(sources);
        intake
    }

    /// Listens to these sources from the next request on, and to no others. Counters of sources that stay go on.
    pub fn replace_sources(&self, sources: Vec<Source>) {
        let doors = sources
            .into_iter()
            .map(|Source { name, kind, registry, auth }| {
                let counters = self.counters.of(&name);
                (name.clone(), Arc::new(Door { name, kind, registry, accepted: Accepted::of(&auth), counters }))
            })
            .collect();
        *self.doors.write().unwrap_or_else(PoisonError::into_inner) = doors;
    }

    /// For `/metrics`.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Takes one request in, as [`Self::authenticate`] and [`Self::accept`] do.
    pub async fn take(&self, source: &str, headers: &HeaderMap, body: Bytes) -> Answer {
        match self.authenticate(source, headers) {
            Some(door) => self.accept(&door, &Incoming::by_http(headers, body)).await,
            None => Answer::Unauthorized,
        }
    }

    /// The door that this request may come in by, if it presents its secret (RFC 9110 section 11, RFC 6750, RFC 7617).
    /// Neither the answer nor the time to it tells a wrong secret from a source that is not there.
    pub fn authenticate(&self, source: &str, headers: &HeaderMap) -> Option<Arc<Door>> {
        let door = self.doors.read().unwrap_or_else(PoisonError::into_inner).get(source).cloned();
        let presented = presented(headers);
        let admitted = match &door {
            Some(door) => door.accepted.holds(&presented),
            None => Accepted::nobody().holds(&presented),
        };
        if admitted {
            return door;
        }
        let refusals = door.as_ref().map_or(self.counters.nobody(), |door| &door.counters).unauthorized();
        // Anybody can knock: the log must not grow with every knock.
        if let Some(door) = door.filter(|_| refusals.is_power_of_two()) {
            warn!(
                source = door.name,
                refusals,
                "a notification without the source's secret was refused: if it is the registry's, events wait there until \
                 the secrets agree"
            );
        }
        None
    }

    /// Takes in what a broker delivered for this source. True once all that it brought is durable here.
    pub async fn deliver(&self, source: &str, incoming: &Incoming) -> bool {
        let door = self.doors.read().unwrap_or_else(PoisonError::into_inner).get(source).cloned();
        match door {
            Some(door) => matches!(self.accept(&door, incoming).await, Answer::Accepted { .. }),
            // Taken out of the configuration a moment ago: the broker keeps it.
            None => false,
        }
    }

    /// Makes all that `incoming` brings durable in one step, and answers after that.
    pub async fn accept(&self, door: &Door, incoming: &Incoming) -> Answer {
        door.counters.request();
        let Sorted { messages, ignored, refusals } = door.sort(incoming, self.clock.now());
        let taken = messages.len() - refusals.len();
        if !messages.is_empty()
            && let Err(error) = self.queue.push(messages).await
        {
            door.counters.refused(Refused::Queue);
            warn!(
                source = door.name,
                error = &error as &dyn Error,
                "the queue did not take a notification: the sender is asked to send it again"
            );
            return Answer::Unavailable;
        }
        if let Some(first) = refusals.first() {
            warn!(
                source = door.name,
                dead_letters = refusals.len(),
                error = first as &dyn Error,
                "a notification, or some of its events, could not be read and is kept as dead letters"
            );
        }
        door.counters.settled(taken, &ignored, &refusals);
        Answer::Accepted { taken, ignored: ignored.len(), quarantined: refusals.len() }
    }
}

/// What one body comes to.
#[derive(Default)]
struct Sorted {
    /// To be queued: the pushes, and one for each refusal.
    messages: Vec<Message>,
    ignored: Vec<Ignored>,
    refusals: Vec<Refusal>,
}

impl Door {
    fn sort(&self, incoming: &Incoming, received_at: Timestamp) -> Sorted {
        let body = &incoming.body;
        let mut sorted = Sorted::default();
        match self.kind.parse(incoming) {
            Ok(entries) => {
                for entry in entries {
                    match entry {
                        Entry::Push(push) => sorted.messages.push(self.message(push, received_at)),
                        Entry::Ignored(reason) => sorted.ignored.push(reason),
                        Entry::Refused { refusal, json } => {
                            sorted.messages.push(self.quarantined(body.slice_ref(json.as_bytes()), received_at));
                            sorted.refusals.push(refusal);
                        }
                    }
                }
            }
            Err(refusal) => {
                sorted.messages.push(self.quarantined(body.clone(), received_at));
                sorted.refusals.push(refusal);
            }
        }
        sorted
    }

    fn message(&self, push: Push, received_at: Timestamp) -> Message {
        let event = PushEvent {
            id: push.id,
            source: self.name.clone(),
            registry: self.registry.clone(),
            repository: push.repository,
            tag: push.tag,
            digest: push.digest,
            pushed_at: push.pushed_at.unwrap_or(received_at),
            received_at,
            actor: push.actor,
        };
        Message {
            id: message_id(received_at),
            content_type: event::CONTENT_TYPE.to_owned(),
            key: PartitionKey(event.partition_key()),
            body: event.to_cloud_event().into(),
            replay_of: None,
        }
    }

    fn quarantined(&self, body: Bytes, received_at: Timestamp) -> Message {
        let id = message_id(received_at);
        // Nothing is known of it that another could be about as well: none waits for another.
        let key = PartitionKey(format!("quarantine/{id}"));
        Message { id, content_type: event::QUARANTINE_CONTENT_TYPE.to_owned(), key, body, replay_of: None }
    }
}

/// A UUID of version 7 (RFC 9562 section 5.7): sorts by time, and is random beside it.
pub(crate) fn message_id(now: Timestamp) -> String {
    let seconds = u64::try_from(now.as_second()).unwrap_or_default();
    let nanoseconds = u32::try_from(now.subsec_nanosecond()).unwrap_or_default();
    Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, seconds, nanoseconds)).to_string()
}

impl fmt::Debug for Intake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Intake").field("queue", &self.queue).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
