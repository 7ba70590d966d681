//! What the embedded queue promises beyond the contract: its folder, its clock, and what it costs.

use std::{
    collections::BTreeMap,
    fs,
    io::{Seek as _, SeekFrom, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use countersign_queue::{Burial, Embedded, Error, Message, Options, PartitionKey, Queue, Retry};
use jiff::{SignedDuration, Timestamp};
use rusqlite::Connection;
use tempfile::tempdir;
use tokio::{task::JoinSet, time::timeout};

#[tokio::test]
async fn folder_and_files_are_for_this_user_only() {
    let parent = tempdir().unwrap();
    let folder = parent.path().join("var/lib/countersign");
    let queue = open(&folder);
    queue.push(vec![message(1, 1)]).await.unwrap();
    assert_eq!(mode(&folder), 0o700);
    let names: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(names.contains(&folder.join("queue.db")) && names.contains(&folder.join("queue.db-wal")), "{names:?}");
    for name in names {
        assert_eq!(mode(&name), 0o600, "{name:?}");
    }
}

#[tokio::test]
async fn folder_is_free_as_soon_as_the_queue_is_dropped() {
    let folder = tempdir().unwrap();
    for round in 0..10 {
        let queue = open(folder.path());
        queue.push(vec![message(round, round)]).await.unwrap();
    }
    assert!(!folder.path().join("queue.db-wal").exists(), "a clean end leaves no log");
    assert_eq!(open(folder.path()).stats().await.unwrap().ready, 10);
}

#[tokio::test]
async fn delivery_can_be_settled_after_its_queue_was_dropped() {
    let folder = tempdir().unwrap();
    let queue = open(folder.path());
    queue.push(vec![message(1, 1)]).await.unwrap();
    let delivery = queue.pull().await.unwrap().unwrap();
    drop(queue);
    assert!(matches!(try_open(folder.path()), Err(Error::InUse { .. })));
    delivery.ack().await.unwrap();
    let queue = loop {
        match try_open(folder.path()) {
            Err(Error::InUse { .. }) => tokio::time::sleep(Duration::from_millis(1)).await,
            opened => break opened.unwrap(),
        }
    };
    assert_eq!(queue.stats().await.unwrap().queued(), 0);
}

#[test]
fn second_queue_in_a_folder_is_refused_with_the_pid() {
    let folder = tempdir().unwrap();
    let _queue = open(folder.path());
    let error = try_open(folder.path()).unwrap_err();
    assert!(matches!(error, Error::InUse { holder: Some(pid), .. } if pid == std::process::id()), "{error:?}");
    assert!(error.to_string().contains(&format!("(pid {})", std::process::id())), "{error}");
}

#[test]
fn database_that_another_program_has_open_is_refused() {
    let folder = tempdir().unwrap();
    drop(open(folder.path()));
    let other = Connection::open(folder.path().join("queue.db")).unwrap();
    let _: i64 = other.query_row("SELECT count(*) FROM message", [], |row| row.get(0)).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    assert!(matches!(try_open(folder.path()), Err(Error::InUse { .. })));
    drop(other);
    open(folder.path());
}

#[test]
fn what_is_no_queue_is_refused_and_left_as_it_is() {
    let something_else = tempdir().unwrap();
    let other = something_else.path().join("other.db");
    Connection::open(&other).unwrap().execute_batch("CREATE TABLE t (a); INSERT INTO t VALUES (1)").unwrap();
    let other = fs::read(other).unwrap();
    let text =
        b"Dear diary, today I learned how long a header is. It is a hundred bytes, they say, and I am longer than that.".to_vec();
    for contents in [other, text, vec![0; 8192], b"SQLite format 3\0".to_vec(), vec![]] {
        let folder = tempdir().unwrap();
        fs::write(folder.path().join("queue.db"), &contents).unwrap();
        let error = try_open(folder.path()).unwrap_err();
        assert!(matches!(error, Error::Unreadable { .. }), "{error:?}");
        assert!(error.to_string().contains("queue.db cannot be opened as a queue"), "{error}");
        assert_eq!(files(folder.path()), BTreeMap::from([("queue.db".into(), contents)]));
    }
}

#[tokio::test]
async fn newer_version_is_refused_and_left_as_it_is() {
    let folder = tempdir().unwrap();
    open(folder.path()).push(vec![message(1, 1)]).await.unwrap();
    Connection::open(folder.path().join("queue.db")).unwrap().execute_batch("PRAGMA user_version = 7").unwrap();
    let before = files(folder.path());
    let error = try_open(folder.path()).unwrap_err();
    assert!(error.to_string().contains("it is of version 7, and this program reads versions up to 2"), "{error}");
    assert_eq!(files(folder.path()), before);
}

#[test]
fn log_without_its_database_is_refused() {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("queue.db-wal"), "pages of another time").unwrap();
    let error = try_open(folder.path()).unwrap_err();
    assert!(matches!(error, Error::Unreadable { .. }), "{error:?}");
    assert!(error.to_string().contains("queue.db-wal"), "{error}");
}

#[test]
fn making_a_queue_that_was_interrupted_is_begun_again() {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("queue.db.new"), "half").unwrap();
    fs::write(folder.path().join("queue.db.new-journal"), "half").unwrap();
    open(folder.path());
    assert!(!folder.path().join("queue.db.new").exists());
}

#[test]
fn folder_that_cannot_be_written_is_named() {
    let parent = tempdir().unwrap();
    let file = parent.path().join("file");
    fs::write(&file, "").unwrap();
    for folder in [file.clone(), file.join("below"), "/proc/self".into(), "/dev/null/queue".into()] {
        let error = try_open(&folder).unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
        let expected = format!("{} must be a folder that this user may write to", folder.display());
        assert!(error.to_string().contains(&expected), "{error}");
        assert!(std::error::Error::source(&error).is_some());
    }
}

#[tokio::test]
async fn id_that_is_queued_already_is_refused_with_all_of_its_call() {
    let folder = tempdir().unwrap();
    let queue = open(folder.path());
    queue.push(vec![message(1, 1)]).await.unwrap();
    let refused = async |messages: Vec<Message>, expected: &str| {
        let error = queue.push(messages).await.unwrap_err();
        assert!(matches!(&error, Error::Duplicate(id) if id == expected), "{error:?}");
    };
    refused(vec![message(2, 2), message(1, 1)], "1").await;
    refused(vec![message(2, 2), message(3, 3), message(2, 4)], "2").await;
    let delivery = queue.pull().await.unwrap().unwrap();
    refused(vec![message(1, 1)], "1").await;
    delivery.bury(Burial { kind: "denied".into(), reason: "r".into() }).await.unwrap();
    refused(vec![message(2, 2), message(1, 1)], "1").await;
    queue.discard("1").await.unwrap();
    refused(vec![message(1, 1)], "1").await;
    queue.push(vec![message(2, 2)]).await.unwrap();
    let stats = queue.stats().await.unwrap();
    assert_eq!((stats.pushed_total, stats.ready, stats.dead), (2, 1, 0));
}

#[tokio::test]
async fn refused_duplicate_does_not_touch_those_who_push_at_the_same_time() {
    let folder = tempdir().unwrap();
    let queue = Arc::new(open(folder.path()));
    queue.push(vec![message(0, 0)]).await.unwrap();
    let mut pushes = JoinSet::new();
    for n in 1..=50 {
        let queue = Arc::clone(&queue);
        let is_new = n % 2 == 1;
        let second = if is_new { 1000 + n } else { 0 };
        pushes.spawn(async move { (is_new, queue.push(vec![message(n, n), message(second, second)]).await) });
    }
    for (is_new, pushed) in pushes.join_all().await {
        assert_eq!(pushed.is_ok(), is_new, "{pushed:?}");
    }
    assert_eq!(queue.stats().await.unwrap().ready, 1 + 25 * 2);
}

#[tokio::test]
async fn clock_says_when_things_happened_and_when_retries_are_due() {
    let folder = tempdir().unwrap();
    let clock = Clock::default();
    let queue = Embedded::open(folder.path(), clock.options()).unwrap();
    clock.set(100);
    queue.push(vec![message(1, 1)]).await.unwrap();
    clock.set(200);
    let delivery = queue.pull().await.unwrap().unwrap();
    assert_eq!(delivery.pushed_at(), Clock::time(100));
    delivery.retry(Retry { after: Duration::from_secs(3600), counted: true, reason: "r".into() }).await.unwrap();
    clock.set(3799);
    assert_eq!(queue.stats().await.unwrap().waiting, 1);
    clock.set(3800);
    assert_eq!(queue.stats().await.unwrap().ready, 1, "an hour after it was handed back");
    let delivery = queue.pull().await.unwrap().unwrap();
    assert_eq!((delivery.attempts(), delivery.waited()), (1, Duration::from_secs(3600)));
    clock.set(4000);
    delivery.bury(Burial { kind: "gave_up".into(), reason: "r".into() }).await.unwrap();
    let letter = queue.dead_letters(None, 1).await.unwrap().remove(0);
    assert_eq!((letter.pushed_at, letter.buried_at, letter.attempts), (Clock::time(100), Clock::time(4000), 1));
}

#[tokio::test]
async fn retry_forever_is_kept_forever_and_its_waits_do_not_overflow() {
    let folder = tempdir().unwrap();
    let clock = Clock::default();
    let queue = Embedded::open(folder.path(), clock.options()).unwrap();
    queue.push(vec![message(1, 1), message(2, 2)]).await.unwrap();
    for _ in 0..2 {
        let forever = Retry { after: Duration::MAX, counted: true, reason: "r".into() };
        queue.pull().await.unwrap().unwrap().retry(forever).await.unwrap();
    }
    assert_eq!(queue.stats().await.unwrap().waiting, 2);
    clock.set(i64::MAX / 1_000_000_000 + 1);
    queue.stats().await.unwrap();
    for _ in 0..2 {
        let delivery = queue.pull().await.unwrap().unwrap();
        assert!(delivery.waited() > Duration::from_secs(3600 * 24 * 365 * 200));
        delivery.retry(Retry { after: Duration::MAX, counted: true, reason: "r".into() }).await.unwrap();
    }
}

#[tokio::test]
async fn many_retries_that_are_due_at_once_all_come() {
    let folder = tempdir().unwrap();
    let clock = Clock::default();
    let queue = Embedded::open(folder.path(), clock.options()).unwrap();
    queue.push((0..1000).map(|n| message(n, n % 600)).collect()).await.unwrap();
    for _ in 0..1000 {
        let retry = Retry { after: Duration::from_secs(60), counted: true, reason: "r".into() };
        queue.pull().await.unwrap().unwrap().retry(retry).await.unwrap();
    }
    assert_eq!(queue.stats().await.unwrap().waiting, 1000);
    clock.set(60);
    queue.stats().await.unwrap();
    for _ in 0..1000 {
        queue.pull().await.unwrap().unwrap().ack().await.unwrap();
    }
    assert_eq!(queue.stats().await.unwrap().queued(), 0);
}

#[tokio::test]
async fn everybody_is_told_when_the_storage_thread_dies() {
    let folder = tempdir().unwrap();
    let broken = Arc::new(AtomicBool::new(false));
    let clock = Arc::clone(&broken);
    let options = Options::new(move || {
        assert!(!clock.load(Ordering::Relaxed), "this clock is broken, as the test has it");
        Timestamp::UNIX_EPOCH
    });
    let queue = Arc::new(Embedded::open(folder.path(), options).unwrap());
    queue.push(vec![message(1, 1)]).await.unwrap();
    let held = queue.pull().await.unwrap().unwrap();
    let waiting = Arc::clone(&queue);
    let mut waiting_pull = JoinSet::new();
    waiting_pull.spawn(async move { waiting.pull().await.map(drop) });
    broken.store(true, Ordering::Relaxed);
    let told = |result: Result<(), Error>| assert!(matches!(result, Err(Error::Died)), "{result:?}");
    told(queue.push(vec![message(2, 2)]).await);
    told(waiting_pull.join_next().await.unwrap().unwrap());
    told(queue.pull().await.map(drop));
    told(held.ack().await);
    told(queue.stats().await.map(drop));
    drop(queue);
    assert_eq!(open(folder.path()).stats().await.unwrap().ready, 1);
}

#[tokio::test]
async fn disk_that_gives_nothing_readable_is_told_to_who_pulls() {
    let folder = tempdir().unwrap();
    let queue = open(folder.path());
    queue.push((0..1000).map(|n| Message { body: vec![b'x'; 3000].into(), ..message(n, n) }).collect()).await.unwrap();
    drop(queue);
    let queue = open(folder.path());
    queue.stats().await.unwrap();
    let mut database = fs::OpenOptions::new().write(true).open(folder.path().join("queue.db")).unwrap();
    let length = database.metadata().unwrap().len();
    database.seek(SeekFrom::Start(length / 2)).unwrap();
    database.write_all(&vec![0; usize::try_from(length / 4).unwrap()]).unwrap();
    let mut held = Vec::new();
    let error = loop {
        match timeout(Duration::from_secs(60), queue.pull()).await.expect("told, not left waiting") {
            Ok(delivery) => held.push(delivery),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
}

/// Time per message may double or triple with the noise of the machine; looking through the backlog would make it hundreds.
#[tokio::test]
async fn cost_of_a_message_does_not_grow_with_a_backlog_of_one_key() {
    let folder = tempdir().unwrap();
    let queue = open(folder.path());
    let mut pushed = 0;
    let mut costs = Vec::new();
    for backlog in [100, 30_000] {
        queue.push((pushed..backlog).map(|n| message(n, 7)).collect()).await.unwrap();
        pushed = backlog;
        // The least of some: others may have the machine meanwhile.
        let mut least = Duration::MAX;
        for round in 0..5 {
            let start = Instant::now();
            for n in 0..20 {
                let other = backlog * 1000 + round * 20 + n;
                queue.push(vec![message(other, other)]).await.unwrap();
                for _ in 0..2 {
                    let delivery = queue.pull().await.unwrap().unwrap();
                    let is_other = delivery.message().id == other.to_string();
                    if is_other {
                        delivery.ack().await.unwrap();
                    } else {
                        delivery.retry(Retry { after: Duration::ZERO, counted: true, reason: "r".into() }).await.unwrap();
                    }
                }
            }
            least = least.min(start.elapsed());
        }
        costs.push(least);
    }
    assert!(costs[1] < 20 * costs[0], "{costs:?}");
}

#[tokio::test]
async fn log_and_file_stay_bounded() {
    let folder = tempdir().unwrap();
    let options = Options { history_bytes: 2 * 1024 * 1024, ..Options::new(|| Timestamp::UNIX_EPOCH) };
    let queue = Embedded::open(folder.path(), options).unwrap();
    for n in 0..300 {
        let mut large = message(n, n);
        large.body = vec![b'x'; 200_000].into();
        queue.push(vec![large]).await.unwrap();
        queue.pull().await.unwrap().unwrap().ack().await.unwrap();
        let log = fs::metadata(folder.path().join("queue.db-wal")).unwrap().len();
        assert!(log < 16 * 1024 * 1024, "{log} bytes after {n} messages");
    }
    let database = fs::metadata(folder.path().join("queue.db")).unwrap().len();
    assert!(database < 6 * 1024 * 1024, "room is used again: {database}");
}

fn open(folder: &Path) -> Embedded {
    try_open(folder).unwrap()
}

fn try_open(folder: &Path) -> Result<Embedded, Error> {
    Embedded::open(folder, Options::new(|| Timestamp::UNIX_EPOCH))
}

fn message(number: i64, key: i64) -> Message {
    Message {
        id: number.to_string(),
        content_type: "text/plain".into(),
        key: PartitionKey(key.to_string()),
        body: format!("body of {number}").into(),
        replay_of: None,
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// All files but the lock, with their contents.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .filter(|(name, _)| name != "queue.lock")
        .collect()
}

/// Seconds since 1970, set by hand. The queue sees it with the next call to it.
#[derive(Clone, Default)]
struct Clock(Arc<Mutex<i64>>);

impl Clock {
    fn options(&self) -> Options {
        let clock = self.clone();
        Options::new(move || Self::time(*clock.0.lock().unwrap()))
    }

    fn set(&self, seconds: i64) {
        *self.0.lock().unwrap() = seconds;
    }

    fn time(seconds: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_secs(seconds)
    }
}
