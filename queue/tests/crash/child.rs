//! The process that is killed, starved or lied to: this test binary again, in a role. It says what it does on its output,
//! one line `@ word argument…` each, before it tries and after it was told that it is done.

use std::{
    env, fs,
    io::Write as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use countersign_queue::{Burial, Embedded, Error, Message, Options, PartitionKey, Queue, Retry};
use jiff::Timestamp;
use tokio::{task::JoinSet, time::timeout};

const ROLE: &str = "COUNTERSIGN_QUEUE_TEST_ROLE";
const FOLDER: &str = "COUNTERSIGN_QUEUE_TEST_FOLDER";
const ROUND: &str = "COUNTERSIGN_QUEUE_TEST_ROUND";

/// Starts the role; `wrapper` is a command that runs the command behind it.
pub fn start(role: &str, folder: &std::path::Path, round: usize, wrapper: &[&str]) -> Child {
    let binary = env::current_exe().unwrap();
    let mut command: Vec<_> = wrapper.iter().map(Into::into).chain([binary.into_os_string()]).collect();
    Command::new(command.remove(0))
        .args(command)
        .args(["child::child", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .env(FOLDER, folder)
        .env(ROUND, round.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What a line of a child's output says; nothing if it is the test harness talking.
pub fn said(line: &str) -> Option<Vec<&str>> {
    Some(line.split_once("@ ")?.1.split(' ').collect())
}

/// Not a test: does nothing unless it was started by one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the process that the other tests kill"]
async fn child() {
    let Ok(role) = env::var(ROLE) else { return };
    match role.as_str() {
        "load" => load(open()).await,
        "load in little room" => load(open_with(|options| options.history_bytes = 256 * 1024)).await,
        "sequence" => sequence().await,
        "hold" => hold().await,
        "stubborn" => stubborn().await,
        _ => unreachable!("no such role"),
    }
}

/// Everything at once, until killed. Ids are `ROUND-PRODUCER-NUMBER`.
async fn load(queue: Embedded) {
    let queue = Arc::new(queue);
    let round = env::var(ROUND).unwrap();
    let mut tasks = JoinSet::new();
    for producer in 0..4 {
        let (queue, round) = (Arc::clone(&queue), round.clone());
        tasks.spawn(async move {
            for first in (0_u64..).step_by(3) {
                let ids: Vec<_> = (first..=first + random(3)).map(|n| format!("{round}-{producer}-{n}")).collect();
                say(&format!("pushing {}", ids.join(" ")));
                queue.push(ids.iter().map(|id| message(id, random(20))).collect()).await.unwrap();
                say(&format!("pushed {}", ids.join(" ")));
            }
        });
    }
    for _ in 0..4 {
        let queue = Arc::clone(&queue);
        tasks.spawn(async move {
            loop {
                for delivery in queue.pull_together().await.unwrap() {
                    let id = delivery.message().id.clone();
                    assert_eq!(delivery.message().body, message(&id, 0).body);
                    match random(10) {
                        0 => drop(delivery),
                        1 => delivery.retry(retry(Duration::from_micros(random(3000)))).await.unwrap(),
                        2 => {
                            say(&format!("burying {id}"));
                            delivery.bury(Burial { kind: "denied".into(), reason: "r".into() }).await.unwrap();
                            say(&format!("buried {id}"));
                        }
                        _ => {
                            say(&format!("acking {id}"));
                            delivery.ack().await.unwrap();
                            say(&format!("acked {id}"));
                        }
                    }
                }
            }
        });
    }
    tasks.spawn(async move {
        loop {
            for letter in queue.dead_letters(None, 5).await.unwrap() {
                let id = letter.message.id;
                if random(2) == 0 {
                    say(&format!("replaying {id}"));
                    assert!(queue.replay(&id).await.unwrap());
                    say(&format!("replayed {id}"));
                } else {
                    say(&format!("discarding {id}"));
                    assert!(queue.discard(&id).await.unwrap());
                    say(&format!("discarded {id}"));
                }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    while tasks.join_next().await.is_some() {}
}

/// Pushes one after the other, says how long the log is after each, and waits to be killed.
async fn sequence() {
    let queue = open();
    let log = PathBuf::from(env::var_os(FOLDER).unwrap()).join("queue.db-wal");
    for n in 0..120 {
        queue.push(vec![message(&n.to_string(), n)]).await.unwrap();
        say(&format!("pushed {n} {}", fs::metadata(&log).unwrap().len()));
    }
    say("done");
    tokio::time::sleep(Duration::from_secs(3600)).await;
}

async fn hold() {
    let _queue = open();
    say("open");
    tokio::time::sleep(Duration::from_secs(3600)).await;
}

/// Pushes, and sometimes acks, on a disk that will refuse some of it and recover; ends with the sums when all is well again.
async fn stubborn() {
    let queue = open();
    let (mut pushed, mut refused, mut pushed_since) = (0, 0, 0);
    for n in 0.. {
        if refused > 0 && pushed_since == 50 {
            break;
        }
        match queue.push(vec![message(&n.to_string(), n)]).await {
            Ok(()) => {
                say(&format!("pushed {n}"));
                pushed += 1;
                pushed_since += 1;
            }
            Err(error @ Error::Unavailable { .. }) => {
                say(&format!("refused {n} {error}"));
                refused += 1;
                pushed_since = 0;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(error) => panic!("{error:?}"),
        }
        if n % 4 == 0
            && let Ok(delivery) = timeout(Duration::from_millis(5), queue.pull()).await
        {
            let delivery = delivery.unwrap().unwrap();
            let id = delivery.message().id.clone();
            // Handled all the same: it must not come again while this process lives.
            match delivery.ack().await {
                Ok(()) => say(&format!("acked {id}")),
                Err(Error::Unavailable { .. }) => say(&format!("unwritten {id}")),
                Err(error) => panic!("{error:?}"),
            }
        }
    }
    let start = Instant::now();
    let stats = loop {
        let stats = queue.stats().await.unwrap();
        if stats.in_flight == 0 || start.elapsed() > Duration::from_secs(40) {
            break stats;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!((stats.in_flight, stats.pushed_total), (0, pushed), "{refused} were refused");
    queue.probe().await.unwrap();
    say(&format!("done {}", stats.queued()));
    tokio::time::sleep(Duration::from_secs(3600)).await;
}

fn open() -> Embedded {
    open_with(|_| {})
}

fn open_with(change: impl FnOnce(&mut Options)) -> Embedded {
    let folder = PathBuf::from(env::var_os(FOLDER).unwrap());
    #[expect(clippy::disallowed_methods, reason = "a process of its own, in real time")]
    let mut options = Options::new(Timestamp::now);
    change(&mut options);
    Embedded::open(&folder, options).unwrap()
}

/// Its body follows from its id, and is between nothing and two pages long.
pub fn message(id: &str, key: u64) -> Message {
    let length: usize = id.bytes().map(|byte| usize::from(byte) * 97).sum::<usize>() % 9000;
    Message {
        id: id.into(),
        content_type: "text/plain".into(),
        key: PartitionKey(format!("key {key}")),
        body: id.bytes().cycle().take(length).collect(),
        replay_of: None,
    }
}

fn retry(after: Duration) -> Retry {
    Retry { after, counted: true, reason: "the registry answers 503".into() }
}

fn say(what: &str) {
    // In one piece: lines of several threads must not mix, and what is said must be out before we go on.
    std::io::stdout().lock().write_all(format!("@ {what}\n").as_bytes()).unwrap();
}

/// Below `bound`, different each time.
pub fn random(bound: u64) -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(0) % bound
}
