//! All objects of one kind, as they are in the cluster: listed, then watched, and listed again when the watch is lost.
//!
//! What was seen last is kept while the API is away, and [`Seen::lost`] says since when.

use std::{collections::BTreeMap, pin::pin, sync::Arc, time::Duration};

use futures::StreamExt as _;
use jiff::Timestamp;
use kube::{
    Api, ResourceExt as _,
    api::{ApiResource, DynamicObject, ListParams, WatchEvent, WatchParams},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{info, warn};

use super::{Cluster, Error};
use crate::clock::Clock;

/// How long one watch lasts before the next begins where it ended, in seconds.
const WATCH: u32 = 60;
/// A watch that the API has not ended by then, and that says nothing, is dead.
const SILENCE: Duration = Duration::from_secs(WATCH as u64 + 30);
/// Watches begin no faster than this, however fast they end.
const SHORTEST: Duration = Duration::from_secs(1);
/// Between two attempts, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// Objects of one answer.
const PAGE: u32 = 500;
/// Objects of one kind.
const MOST: usize = 50_000;

/// By name.
pub type Objects = BTreeMap<String, Arc<DynamicObject>>;

/// What is known of one kind.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// None: they have not been read yet.
    pub objects: Option<Arc<Objects>>,
    pub lost: Option<Lost>,
}

/// The API could not be asked lately.
#[derive(Debug, Clone)]
pub struct Lost {
    pub since: Timestamp,
    pub why: String,
}

/// Keeps `seen` as the cluster has it. Objects that are in no namespace, by their names. Never ends.
pub async fn follow(cluster: Cluster, kind: ApiResource, clock: Clock, seen: watch::Sender<Seen>) {
    let api: Api<DynamicObject> = Api::all_with(cluster.client(), &kind);
    let mut pause = PAUSES.0;
    loop {
        let began = Instant::now();
        let error = live(&cluster, &api, &kind, &seen).await;
        if began.elapsed() > PAUSES.1 {
            pause = PAUSES.0;
        }
        let why = format!("{:#}", anyhow::Error::new(error));
        warn!(kind = kind.kind, error = why, "the watch was lost: what was seen last counts on");
        let lost = Lost { since: clock.now(), why };
        seen.send_modify(|seen| {
            let since = seen.lost.take().map_or(lost.since, |before| before.since);
            seen.lost = Some(Lost { since, ..lost });
        });
        sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Those that there are now. Of objects that are in no namespace.
pub async fn list(cluster: &Cluster, kind: &ApiResource) -> Result<Objects, Error> {
    pages(cluster, &Api::all_with(cluster.client(), kind)).await.map(|(objects, _)| objects)
}

/// Until something is wrong.
async fn live(cluster: &Cluster, api: &Api<DynamicObject>, kind: &ApiResource, seen: &watch::Sender<Seen>) -> Error {
    let (mut objects, mut version) = match pages(cluster, api).await {
        Ok(listed) => listed,
        Err(error) => return error,
    };
    info!(kind = kind.kind, objects = objects.len(), "the cluster's resources were read");
    publish(seen, &objects);
    let parameters = WatchParams::default().timeout(WATCH);
    loop {
        let began = Instant::now();
        let mut events = match cluster.ask(api.watch(&parameters, &version)).await {
            Ok(events) => pin!(events),
            Err(error) => return error,
        };
        loop {
            match timeout(SILENCE, events.next()).await {
                Err(_) => return Error::Late(SILENCE),
                Ok(None) => break,
                Ok(Some(Err(error))) => return error.into(),
                Ok(Some(Ok(WatchEvent::Error(status)))) => return kube::Error::Api(status).into(),
                Ok(Some(Ok(WatchEvent::Bookmark(bookmark)))) => {
                    version = bookmark.metadata.resource_version;
                    continue;
                }
                Ok(Some(Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)))) => {
                    version = object.resource_version().unwrap_or_default();
                    objects.insert(object.name_any(), kept(object));
                }
                Ok(Some(Ok(WatchEvent::Deleted(object)))) => {
                    version = object.resource_version().unwrap_or_default();
                    objects.remove(&object.name_any());
                }
            }
            if objects.len() > MOST {
                return Error::TooMany(MOST);
            }
            publish(seen, &objects);
        }
        sleep_until(began + SHORTEST).await;
    }
}

async fn pages(cluster: &Cluster, api: &Api<DynamicObject>) -> Result<(Objects, String), Error> {
    let mut objects = Objects::new();
    let mut parameters = ListParams::default().limit(PAGE);
    loop {
        let page = cluster.ask(api.list(&parameters)).await?;
        objects.extend(page.items.into_iter().map(|object| (object.name_any(), kept(object))));
        if objects.len() > MOST {
            return Err(Error::TooMany(MOST));
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters.continue_token = Some(token),
            None => return Ok((objects, page.metadata.resource_version.unwrap_or_default())),
        }
    }
}

/// Without what only the API server has use for.
fn kept(mut object: DynamicObject) -> Arc<DynamicObject> {
    object.metadata.managed_fields = None;
    Arc::new(object)
}

fn publish(seen: &watch::Sender<Seen>, objects: &Objects) {
    seen.send_modify(|seen| *seen = Seen { objects: Some(Arc::new(objects.clone())), lost: None });
}
