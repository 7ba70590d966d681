//! Durable events per second into the embedded queue, beside the bare engine: `cargo bench -p countersign-queue`.
//!
//! Each measurement is a process of its own with `syncs.c` preloaded, which counts its syncs and can slow them down. Rounds
//! are interleaved and medians are told. "Bare" is one thread that inserts batches of the size that ours reached, each in a
//! synced transaction, into a table of two columns: what the same engine does when nothing else is asked of it.

#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts and shares of a benchmark are far below where this matters"
)]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use countersign_queue::{Embedded, Message, Options, PartitionKey, Queue};
use jiff::Timestamp;
use rusqlite::Connection;
use tokio::{runtime, task::JoinSet};

const ROUNDS: usize = 3;
const SPAN: Duration = Duration::from_millis(1500);
/// About what a push event is.
const BODY: usize = 1200;

fn main() {
    match env::args().skip(1).collect::<Vec<_>>().iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["measure", what, number] => println!("{}", measure(what, number.parse().unwrap()).line()),
        // Without it this is a test run, which has no business here.
        ref arguments if arguments.contains(&"--bench") => compare(),
        _ => println!("run me with `cargo bench`"),
    }
}

fn compare() {
    let tools = Tools::new();
    println!("load average {}", fs::read_to_string("/proc/loadavg").unwrap().trim());
    for delay in [0, 2000] {
        println!("\nsyncs {}", if delay == 0 { "as this disk has them".into() } else { format!("slowed by {delay} us") });
        println!("{:>26} {:>10} {:>10} {:>8} {:>8} {:>8}", "", "events/s", "syncs/ev", "cpu us", "p50 us", "p99 us");
        for in_flight in [1, 32, 256] {
            let (mut ours, mut bare) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                ours.push(tools.run("push", in_flight, delay));
                let batch = (1.0 / ours[ours.len() - 1].syncs).round().max(1.0) as u64;
                bare.push(tools.run("bare", batch, delay));
            }
            let (ours, bare) = (Measured::median(&ours), Measured::median(&bare));
            ours.print(&format!("push, {in_flight} in flight"));
            bare.print("bare, same batches");
            println!("{:>26} {:>10.2}", "ratio", ours.rate / bare.rate);
        }
        let whole: Vec<_> = (0..ROUNDS).map(|_| tools.run("whole", 32, delay)).collect();
        Measured::median(&whole).print("push+pull+ack, 32 each");
    }
    println!("\nload average {}", fs::read_to_string("/proc/loadavg").unwrap().trim());
}

/// How a measurement is run.
struct Tools {
    shim: PathBuf,
    count: PathBuf,
}

impl Tools {
    fn new() -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let (shim, count) = (folder.join("syncs.so"), folder.join("syncs.count"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/syncs.c");
        let compiled = Command::new("cc").args(["-O2", "-shared", "-fPIC", "-o"]).arg(&shim).arg(source).status();
        assert!(compiled.expect("cc is installed").success());
        Self { shim, count }
    }

    fn run(&self, what: &str, number: u64, delay: u64) -> Measured {
        fs::write(&self.count, 0_u64.to_ne_bytes()).unwrap();
        let output = Command::new(env::current_exe().unwrap())
            .args(["measure", what, &number.to_string()])
            .env("LD_PRELOAD", &self.shim)
            .env("SYNC_COUNT", &self.count)
            .env("SYNC_DELAY", delay.to_string())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Measured::parse(&String::from_utf8(output.stdout).unwrap())
    }
}

#[derive(Clone, Copy)]
struct Measured {
    /// Events per second.
    rate: f64,
    /// Per event.
    syncs: f64,
    /// Microseconds of this process per event.
    cpu: f64,
    /// Microseconds until an event was durable.
    p50: f64,
    p99: f64,
}

impl Measured {
    fn median(all: &[Self]) -> Self {
        let middle = |field: fn(&Self) -> f64| {
            let mut values: Vec<_> = all.iter().map(field).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        Self {
            rate: middle(|it| it.rate),
            syncs: middle(|it| it.syncs),
            cpu: middle(|it| it.cpu),
            p50: middle(|it| it.p50),
            p99: middle(|it| it.p99),
        }
    }

    fn print(&self, what: &str) {
        let Self { rate, syncs, cpu, p50, p99 } = self;
        println!("{what:>26} {rate:>10.0} {syncs:>10.4} {cpu:>8.1} {p50:>8.0} {p99:>8.0}");
    }

    fn line(&self) -> String {
        format!("{} {} {} {} {}", self.rate, self.syncs, self.cpu, self.p50, self.p99)
    }

    fn parse(line: &str) -> Self {
        let mut numbers = line.split_whitespace().map(|number| number.parse().unwrap());
        let mut next = || numbers.next().unwrap();
        Self { rate: next(), syncs: next(), cpu: next(), p50: next(), p99: next() }
    }
}

fn measure(what: &str, number: u64) -> Measured {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    match what {
        "bare" => bare(folder.path(), number),
        "push" => runtime::Runtime::new().unwrap().block_on(ours(folder.path(), number, false)),
        "whole" => runtime::Runtime::new().unwrap().block_on(ours(folder.path(), number, true)),
        _ => unreachable!("no such measurement"),
    }
}

/// So many producers, each with one push under way; and if asked for, as many consumers.
async fn ours(folder: &Path, in_flight: u64, consumed: bool) -> Measured {
    #[expect(clippy::disallowed_methods, reason = "the machine's own clock is part of the cost")]
    let queue = Arc::new(Embedded::open(folder, Options::new(Timestamp::now)).unwrap());
    let numbers = Arc::new(AtomicU64::new(0));
    let meter = Meter::start();
    let mut producers = JoinSet::new();
    for _ in 0..in_flight {
        let (queue, numbers) = (Arc::clone(&queue), Arc::clone(&numbers));
        producers.spawn(async move {
            let mut latencies = Vec::new();
            while meter.begun.elapsed() < SPAN {
                let message = message(numbers.fetch_add(1, Ordering::Relaxed));
                let start = Instant::now();
                queue.push(vec![message]).await.unwrap();
                latencies.push(start.elapsed());
            }
            latencies
        });
    }
    let mut consumers = JoinSet::new();
    for _ in 0..if consumed { in_flight } else { 0 } {
        let queue = Arc::clone(&queue);
        consumers.spawn(async move {
            while let Some(delivery) = queue.pull().await.unwrap() {
                delivery.ack().await.unwrap();
            }
        });
    }
    let latencies = producers.join_all().await.concat();
    while consumed && queue.stats().await.unwrap().queued() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let measured = meter.stop(latencies);
    queue.close().await;
    consumers.join_all().await;
    measured
}

fn bare(folder: &Path, batch: u64) -> Measured {
    let connection = Connection::open(folder.join("bare.db")).unwrap();
    connection
        .execute_batch(
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
             PRAGMA wal_autocheckpoint = 2000; CREATE TABLE event (id INTEGER PRIMARY KEY, body BLOB)",
        )
        .unwrap();
    let body = vec![b'x'; BODY];
    let meter = Meter::start();
    let mut latencies = Vec::new();
    while meter.begun.elapsed() < SPAN {
        let start = Instant::now();
        connection.prepare_cached("BEGIN IMMEDIATE").unwrap().execute([]).unwrap();
        for _ in 0..batch {
            connection.prepare_cached("INSERT INTO event (body) VALUES (?1)").unwrap().execute([&body[..]]).unwrap();
        }
        connection.prepare_cached("COMMIT").unwrap().execute([]).unwrap();
        latencies.extend((0..batch).map(|_| start.elapsed()));
    }
    meter.stop(latencies)
}

/// As the daemon makes them: ids that sort by time, a digest for a key.
fn message(number: u64) -> Message {
    let scattered = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    Message {
        id: format!("0190a1b2-{number:016x}-{scattered:010.10x}"),
        content_type: "application/cloudevents+json".into(),
        key: PartitionKey(format!("sha256:{scattered:016x}{:016x}{number:016x}{number:016x}", !scattered)),
        body: vec![b'x'; BODY].into(),
        replay_of: None,
    }
}

#[derive(Clone, Copy)]
struct Meter {
    begun: Instant,
    syncs: u64,
    cpu: Duration,
}

impl Meter {
    fn start() -> Self {
        Self { begun: Instant::now(), syncs: syncs(), cpu: cpu() }
    }

    /// `latencies`: one for each event.
    fn stop(self, mut latencies: Vec<Duration>) -> Measured {
        let (took, syncs, cpu) = (self.begun.elapsed(), syncs() - self.syncs, cpu().saturating_sub(self.cpu));
        let events = latencies.len() as f64;
        latencies.sort();
        let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
        Measured {
            rate: events / took.as_secs_f64(),
            syncs: syncs as f64 / events,
            cpu: cpu.as_secs_f64() * 1e6 / events,
            p50: at(0.5),
            p99: at(0.99),
        }
    }
}

fn syncs() -> u64 {
    let count = fs::read(env::var_os("SYNC_COUNT").unwrap()).unwrap();
    u64::from_ne_bytes(count.try_into().unwrap())
}

/// User and system time of this process so far: proc(5), `/proc/pid/stat`, fields 14 and 15, in hundredths of a second.
fn cpu() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    Duration::from_millis(10 * (fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()))
}
