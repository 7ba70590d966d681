//! What was pushed at the moment when the broker is killed, and got neither yes nor no: it is counted if it is handled, and only
//! then.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use countersign_queue::{Amqp, Message, PartitionKey, Queue, amqp::Options};
use integration_tests::process::eventually;
use jiff::Timestamp;
use rusqlite::{Connection, OpenFlags};
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::{broker::options, own_broker};

const LIMIT: Duration = Duration::from_secs(180);
const ROUNDS: u64 = 2;
/// Pushes that are under way at once, of each process.
const PUSHERS: usize = 32;
const BODY: usize = 2000;

/// Ids, and whether the push was answered with yes.
type Pushed = Arc<Mutex<HashMap<String, bool>>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_broker_has_not_answered_when_it_is_killed_is_counted_if_it_comes() {
    let (mut broker, _shared) = own_broker().await;
    let (url, tracker) = (broker.url(), TaskTracker::new());
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(format!("{name}.db"));
    let open = async |name: &str, consume| {
        let url = url.clone();
        let unanswered = Some(file(name));
        let options = Options { consume, unanswered, ..options(name, move || vec![url.clone()]) };
        Arc::new(Amqp::open(options, &tracker).await.unwrap())
    };
    let queue = open("stays", true).await;
    broker.sync().await.unwrap();
    let came: Arc<Mutex<HashSet<String>>> = Arc::default();
    let taking = tracker.spawn({
        let (queue, came) = (Arc::clone(&queue), Arc::clone(&came));
        async move {
            while let Some(delivery) = queue.pull().await.unwrap() {
                came.lock().unwrap().insert(delivery.message().id.clone());
                // Decided is decided, and told when there is a connection.
                let _ = delivery.ack().await;
            }
        }
    });
    let (pushed, number) = (Pushed::default(), Arc::new(AtomicU64::new(0)));
    for round in 0..ROUNDS {
        eventually("it is connected again", LIMIT, async || Ok(queue.probe().await.ok())).await.unwrap();
        let dies = open("dies", false).await;
        let mut pushing = JoinSet::new();
        for sender in [&queue, &dies] {
            for _ in 0..PUSHERS {
                pushing.spawn(push_until_refused(Arc::clone(sender), Arc::clone(&pushed), Arc::clone(&number)));
            }
        }
        tokio::time::sleep(Duration::from_millis(300 + 100 * round)).await;
        broker.kill().unwrap();
        pushing.join_all().await;
        eventually("they have written down what they do not know", LIMIT, async || {
            Ok((left(&file("dies")) > Some(0) && left(&file("stays")) > Some(0)).then_some(()))
        })
        .await
        .unwrap();
        // As if it were killed as well.
        drop(dies);
        broker.start_again().await.unwrap();
        let again = open("dies", false).await;
        eventually("nothing is left", LIMIT, async || {
            Ok((left(&file("dies")) == Some(0) && left(&file("stays")) == Some(0)).then_some(()))
        })
        .await
        .unwrap();
        drop(again);
    }
    let settled = eventually("all is settled", LIMIT, async || {
        let Ok(stats) = queue.stats().await else { return Ok(None) };
        Ok((stats.queued() == 0 && stats.pushed_total == came.lock().unwrap().len() as u64).then_some(stats))
    })
    .await;
    let mut recorded: HashMap<String, u32> = HashMap::new();
    let mut after = None;
    loop {
        let page = queue.history(Timestamp::MIN, Timestamp::MAX, after.as_deref(), 1000).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.cursor.clone());
        for kept in page {
            *recorded.entry(kept.message.id).or_default() += 1;
        }
    }
    let came = came.lock().unwrap().clone();
    let mut kinds: BTreeMap<_, u32> = BTreeMap::new();
    for (id, yes) in &*pushed.lock().unwrap() {
        *kinds.entry((*yes, recorded.get(id).copied().unwrap_or_default(), came.contains(id))).or_default() += 1;
    }
    let shown: Vec<String> = kinds
        .iter()
        .map(|((yes, records, came), many)| {
            let answered = if *yes { "confirmed" } else { "unanswered" };
            format!("{many} {answered}, {records} times in the past, {}", if *came { "came" } else { "never came" })
        })
        .collect();
    eprintln!("{shown:#?}; {} came; {:?}", came.len(), queue.stats().await);
    settled.unwrap();
    for (yes, records, came) in kinds.into_keys() {
        assert_eq!(records, u32::from(came), "{shown:#?}");
        assert!(came || !yes, "{shown:#?}");
    }
    queue.close().await;
    taking.await.unwrap();
}

/// How many pushes a file has; `None` while it cannot be read.
fn left(file: &Path) -> Option<i64> {
    let connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY).ok()?;
    connection.query_row("SELECT count(*) FROM message", [], |row| row.get(0)).ok()
}

async fn push_until_refused(queue: Arc<Amqp>, pushed: Pushed, number: Arc<AtomicU64>) {
    loop {
        let number = number.fetch_add(1, Ordering::Relaxed);
        let message = Message {
            id: number.to_string(),
            content_type: "text/plain".to_owned(),
            key: PartitionKey(format!("key {number}")),
            body: Bytes::from(vec![b'x'; BODY]),
            replay_of: None,
        };
        let taken = queue.push(vec![message]).await.is_ok();
        pushed.lock().unwrap().insert(number.to_string(), taken);
        if !taken {
            return;
        }
    }
}
