//! What the embedded queue keeps of the past, beyond the contract: its bounds, its cost, and files of earlier versions.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use countersign_queue::{Embedded, Kept, Message, Options, PartitionKey, Queue};
use jiff::{SignedDuration, Timestamp};
use rusqlite::Connection;
use tempfile::tempdir;

const HOUR: Duration = Duration::from_secs(3600);

/// What the last commit of version 1 left: one message ready and one blocked behind it, one waiting for its retry, one dead; one
/// acked and one discarded.
const VERSION_1: &[u8] = include_bytes!("data/queue-version-1.db");

#[tokio::test]
async fn queue_of_version_1_is_brought_along() {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("queue.db"), VERSION_1).unwrap();
    let clock = Hand::at("2026-11-20T00:10:00Z");
    for _ in 0..2 {
        let queue = clock.open(folder.path(), HOUR, u64::MAX);
        let stats = queue.stats().await.unwrap();
        assert_eq!((stats.pushed_total, stats.discarded_total), (6, 1));
        assert_eq!((stats.ready, stats.waiting, stats.dead), (2, 1, 1));
        assert_eq!(stats.oldest, Some("2026-11-20T00:00:00Z".parse().unwrap()));
        assert_eq!(ids(&all(&queue).await), ["waiting", "ready", "blocked"], "what was settled was not kept then");
    }
    assert_bytes_are_right(folder.path());
    let queue = clock.open(folder.path(), HOUR, u64::MAX);
    assert!(queue.replay("dead").await.unwrap());
    clock.pass(HOUR);
    queue.stats().await.unwrap();
    for _ in 0..4 {
        let delivery = queue.pull().await.unwrap().unwrap();
        let id = &delivery.message().id;
        assert!(delivery.message().body.starts_with(format!("body of {id} ").as_bytes()));
        assert_eq!(delivery.message().replay_of, None);
        delivery.ack().await.unwrap();
    }
    assert_eq!(queue.stats().await.unwrap().queued(), 0);
}

#[tokio::test]
async fn what_is_too_old_is_removed_in_steps_also_when_nothing_else_happens() {
    let folder = tempdir().unwrap();
    let clock = Hand::at("2026-11-20T00:00:00Z");
    let queue = clock.open(folder.path(), HOUR, u64::MAX);
    settle_many(&queue, 0..2000).await;
    clock.pass(HOUR / 2);
    settle_many(&queue, 2000..2100).await;
    clock.pass(HOUR / 2 + Duration::from_secs(1));
    assert_eq!(all(&queue).await.len(), 100, "told at once");
    clock.pass(Duration::from_secs(60));
    queue.stats().await.unwrap();
    while queue.stats().await.unwrap().history.unwrap().messages > 100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(all(&queue).await.len(), 100);
    drop(queue);
    assert_bytes_are_right(folder.path());
    let rows = |sql| Connection::open(folder.path().join("queue.db")).unwrap().query_row(sql, [], |row| row.get(0));
    assert_eq!(rows("SELECT count(*) FROM message"), Ok(100));
}

#[tokio::test]
async fn room_for_the_past_is_bounded_and_what_is_queued_is_never_forgotten() {
    let folder = tempdir().unwrap();
    let clock = Hand::at("2026-11-20T00:00:00Z");
    let room = 512 * 1024;
    let queue = clock.open(folder.path(), HOUR, room);
    settle_many(&queue, 0..3000).await;
    let kept = all(&queue).await;
    let size: usize = kept.iter().map(|kept| kept.message.body.len() + 512).sum();
    assert!(size as u64 <= room + room / 64, "{size}");
    assert!(size as u64 > room / 2, "{size}");
    assert_eq!(kept.last().unwrap().message.id, "2999", "the oldest go first");
    // A backlog takes all the room there is, and more.
    queue.push((3000..4000).map(message).collect()).await.unwrap();
    while queue.stats().await.unwrap().history.unwrap().messages > 1000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(queue.stats().await.unwrap().ready, 1000);
    drop(queue);
    assert_bytes_are_right(folder.path());
}

#[tokio::test]
async fn past_is_dropped_when_it_is_no_longer_wanted_and_begins_anew_when_it_is() {
    let folder = tempdir().unwrap();
    let clock = Hand::at("2026-11-20T00:00:00Z");
    settle_many(&clock.open(folder.path(), HOUR, u64::MAX), 0..600).await;
    let queue = clock.open(folder.path(), Duration::ZERO, u64::MAX);
    assert_eq!(ids(&all(&queue).await), [""; 0]);
    settle_many(&queue, 600..700).await;
    drop(queue);
    let queue = clock.open(folder.path(), HOUR, u64::MAX);
    settle_many(&queue, 700..710).await;
    assert!(ids(&all(&queue).await).ends_with(&(700..710).map(|n| n.to_string()).collect::<Vec<_>>()));
    drop(queue);
    assert_bytes_are_right(folder.path());
}

#[tokio::test]
async fn dead_letter_outlives_what_is_kept_of_it() {
    let folder = tempdir().unwrap();
    let clock = Hand::at("2026-11-20T00:00:00Z");
    let queue = clock.open(folder.path(), HOUR, u64::MAX);
    queue.push(vec![message(1)]).await.unwrap();
    let burial = countersign_queue::Burial { kind: "refused".into(), reason: "r".into() };
    queue.pull().await.unwrap().unwrap().bury(burial).await.unwrap();
    clock.pass(2 * HOUR);
    while queue.stats().await.unwrap().history.unwrap().messages > 0 {
        tokio::task::yield_now().await;
    }
    assert!(queue.replay("1").await.unwrap());
    assert_eq!(queue.pull().await.unwrap().unwrap().message(), &message(1));
    drop(queue);
    assert_bytes_are_right(folder.path());
}

#[tokio::test]
async fn clock_that_is_set_back_loses_nothing_of_the_past() {
    let folder = tempdir().unwrap();
    let clock = Hand::at("2026-11-20T12:00:00Z");
    let queue = clock.open(folder.path(), HOUR, u64::MAX);
    settle_many(&queue, 0..3).await;
    clock.set("2026-11-20T11:00:00Z");
    settle_many(&queue, 3..6).await;
    assert_eq!(ids(&all(&queue).await), ["3", "4", "5", "0", "1", "2"]);
    clock.set("2026-11-20T12:30:00Z");
    assert_eq!(ids(&all(&queue).await), ["0", "1", "2"]);
}

/// A page out of the middle of a long past costs no more than one out of a short.
#[tokio::test]
async fn page_of_history_needs_no_sorting_and_no_search() {
    let folder = tempdir().unwrap();
    drop(Hand::at("2026-11-20T00:00:00Z").open(folder.path(), HOUR, u64::MAX));
    let connection = Connection::open(folder.path().join("queue.db")).unwrap();
    let half = |state: &str| {
        format!(
            "SELECT id, pushed_at, seq FROM message WHERE {state} AND pushed_at >= 1 AND pushed_at < 9 AND (pushed_at, seq) > (2, 3)"
        )
    };
    let sql = format!("EXPLAIN QUERY PLAN {} UNION ALL {} ORDER BY pushed_at, seq", half("state = 3"), half("state < 3"));
    let mut plan = connection.prepare(&sql).unwrap();
    let plan: Vec<String> = plan.query_map([], |row| row.get("detail")).unwrap().map(Result::unwrap).collect();
    let plan = plan.join("\n");
    assert!(plan.contains("USING INDEX message_kept") && plan.contains("USING INDEX message_live"), "{plan}");
    assert!(!plan.contains("TEMP B-TREE") && !plan.contains("SCAN"), "{plan}");
}

async fn settle_many(queue: &Embedded, numbers: std::ops::Range<u64>) {
    let many = numbers.end - numbers.start;
    queue.push(numbers.map(message).collect()).await.unwrap();
    for _ in 0..many {
        queue.pull().await.unwrap().unwrap().ack().await.unwrap();
    }
}

async fn all(queue: &Embedded) -> Vec<Kept> {
    let mut all: Vec<Kept> = Vec::new();
    loop {
        let after = all.last().map(|kept| kept.cursor.clone());
        let page = queue.history(Timestamp::MIN, Timestamp::MAX, after.as_deref(), 1000).await.unwrap();
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

fn ids(kept: &[Kept]) -> Vec<String> {
    kept.iter().map(|kept| kept.message.id.clone()).collect()
}

/// What is counted is what is there.
fn assert_bytes_are_right(folder: &Path) {
    let connection = Connection::open(folder.join("queue.db")).unwrap();
    let sql = "SELECT bytes, (SELECT coalesce(sum(length(body) + 512), 0) FROM message) FROM totals";
    let (counted, there): (i64, i64) = connection.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    assert_eq!(counted, there);
}

fn message(number: u64) -> Message {
    Message {
        id: number.to_string(),
        content_type: "text/plain".into(),
        key: PartitionKey(number.to_string()),
        body: format!("body of {number}").into(),
        replay_of: None,
    }
}

/// A clock that is set by hand: nanoseconds since 1970.
#[derive(Clone)]
struct Hand(Arc<AtomicI64>);

impl Hand {
    fn at(time: &str) -> Self {
        let hand = Self(Arc::default());
        hand.set(time);
        hand
    }

    fn set(&self, time: &str) {
        let time: Timestamp = time.parse().unwrap();
        self.0.store(time.as_nanosecond().try_into().unwrap(), Ordering::SeqCst);
    }

    fn pass(&self, time: Duration) {
        self.0.fetch_add(time.as_nanos().try_into().unwrap(), Ordering::SeqCst);
    }

    fn open(&self, folder: &Path, history: Duration, history_bytes: u64) -> Embedded {
        let hand = self.clone();
        let now = move || Timestamp::UNIX_EPOCH + SignedDuration::from_nanos(hand.0.load(Ordering::SeqCst));
        Embedded::open(folder, Options { history, history_bytes, ..Options::new(now) }).unwrap()
    }
}
