//! Durable events per second in, beside the bare engine, on this disk as it is and with slow syncs.

use std::env;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::house::{Keys, rule};

use crate::meter::Syncs;
use crate::report::{Aim, Cell, Table, float, median, milliseconds, number, percentile, target, text};
use crate::stage::{Flood, Plan, Stage};
use crate::wire::{Until, Wire, at_once};
use crate::{Scale, bare};

pub async fn measure(scale: Scale) -> Result<Table> {
    let columns = ["", "in flight", "events/s", "of bare", "syncs/event", "answer p50 ms", "p99 ms", "CPU us/event"];
    let mut table = Table::new("events", "Durable events per second in", &columns);
    let syncs = Syncs::build()?;
    let span = Duration::from_millis(if scale.quick { 400 } else { 1200 });
    for slowed in [Duration::ZERO, Duration::from_millis(2)] {
        for in_flight in [1, 32, 256] {
            row(
                &mut table,
                Meanwhile::Paused,
                in_flight,
                slowed,
                &rounds(scale, &syncs, Meanwhile::Paused, in_flight, slowed, span).await?,
            );
        }
        row(&mut table, Meanwhile::Skipping, 32, slowed, &rounds(scale, &syncs, Meanwhile::Skipping, 32, slowed, span).await?);
    }
    table.note("waiting: the one worker waits for a registry that never answers, so that all that is done is to take events in");
    table.note(
        "skipping: 32 workers handle them meanwhile and skip each, by a rule that is disabled; the ledger's syncs count too",
    );
    table.note("bare: one thread of the same SQLite inserting into one table, in synced transactions as large as ours became");
    table.close();
    Ok(table)
}

/// What the pipeline does meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meanwhile {
    Paused,
    Skipping,
}

struct Round {
    rate: f64,
    bare: f64,
    syncs: f64,
    p50: Duration,
    p99: Duration,
    /// Microseconds of the daemon for each event.
    cpu: f64,
}

async fn rounds(
    scale: Scale,
    syncs: &Syncs,
    meanwhile: Meanwhile,
    in_flight: usize,
    slowed: Duration,
    span: Duration,
) -> Result<Vec<Round>> {
    let mut rounds = Vec::new();
    for _ in 0..scale.rounds {
        rounds.push(round(syncs, meanwhile, in_flight, slowed, span).await?);
    }
    Ok(rounds)
}

async fn round(syncs: &Syncs, meanwhile: Meanwhile, in_flight: usize, slowed: Duration, span: Duration) -> Result<Round> {
    let silence = Silence::bind()?;
    let rule = rule("bench", "bench", Keys::P256);
    let (workers, rules) = match meanwhile {
        Meanwhile::Paused => (1, rule),
        Meanwhile::Skipping => (32, format!("{rule}enabled = false\n")),
    };
    let (count, environment) = syncs.watch(slowed)?;
    let stage = Stage::start(Plan { on_disk: true, environment, ..Plan::new(&silence.host, workers, rules) }).await?;
    let flood = Arc::new(Flood::new(&silence.host, "bench/events"));

    let (before, cpu) = (count.read()?, stage.cpu()?);
    let mut done = at_once(stage.host(), in_flight, Until::Time(span), &flood).await?;
    let (synced, cpu) = (count.read()? - before, stage.cpu()? - cpu);
    let events = done.each.len();
    let received = stage.metrics(&mut Wire::open(stage.host()).await?).await?.received();
    ensure!(received == u64::try_from(events)?, "{events} events were answered 202, and {received} are counted");
    drop(stage);

    let syncs_each = float(synced) / float(events);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few hundred at most")]
    let batch = (1.0 / syncs_each).round().max(1.0) as u64;
    Ok(Round {
        rate: done.per_second(),
        bare: bare_commits(syncs, batch, slowed, span)?,
        syncs: syncs_each,
        p50: percentile(&mut done.each, 0.5),
        p99: percentile(&mut done.each, 0.99),
        cpu: cpu * 1e6 / float(events),
    })
}

fn row(table: &mut Table, meanwhile: Meanwhile, in_flight: usize, slowed: Duration, rounds: &[Round]) {
    let of = |field: fn(&Round) -> f64| median(rounds.iter().map(field));
    let time = |field: fn(&Round) -> f64| milliseconds(Duration::from_secs_f64(of(field)));
    let disk = if slowed.is_zero() { "this disk".to_owned() } else { format!("syncs +{slowed:?}") };
    let word = if meanwhile == Meanwhile::Paused { "waiting" } else { "skipping" };
    table.row([
        text(format!("{disk}, {word}")),
        number(float(in_flight), 0),
        number(of(|round| round.rate), 0),
        if meanwhile == Meanwhile::Paused { number(of(|round| round.rate / round.bare), 2) } else { Cell::None },
        number(of(|round| round.syncs), 4),
        time(|round| round.p50.as_secs_f64()),
        time(|round| round.p99.as_secs_f64()),
        number(of(|round| round.cpu), 0),
    ]);
    if meanwhile == Meanwhile::Paused && slowed.is_zero() && in_flight == 1 {
        table.aim("answer p50 ms", Aim::AtMost(1.0), "events, 1 in flight: answer p50 in ms");
    }
    if meanwhile == Meanwhile::Paused && !slowed.is_zero() && in_flight == 32 {
        table.aim("events/s", Aim::AtLeast(5000.0), "events, 32 in flight, syncs of 2 ms: events/s");
        table.aim("syncs/event", Aim::AtMost(0.125), "events, 32 in flight, syncs of 2 ms: syncs per event");
    }
}

/// A registry that takes connections, as its kernel does for it, and never answers.
pub struct Silence {
    pub host: String,
    _listener: TcpListener,
}

impl Silence {
    pub fn bind() -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        Ok(Self { host: listener.local_addr()?.to_string(), _listener: listener })
    }
}

/// Has this program do [`bare::commits`] as a process of its own, whose syncs are slowed.
fn bare_commits(syncs: &Syncs, batch: u64, slowed: Duration, span: Duration) -> Result<f64> {
    let folder = tempfile::Builder::new().prefix("bench-").tempdir_in(target()?)?;
    let (_count, environment) = syncs.watch(slowed)?;
    let mut command = Command::new(env::current_exe()?);
    command.args(["bare-commits", &batch.to_string(), &span.as_millis().to_string()]).arg(folder.path()).envs(environment);
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout)?.trim().parse().context("the bare engine's rate")
}

/// What [`bare_commits`] started.
pub fn run_bare_commits(batch: &str, milliseconds: &str, folder: &str) -> Result<()> {
    let rate = bare::commits(Path::new(folder), batch.parse()?, Duration::from_millis(milliseconds.parse()?))?;
    println!("{rate}");
    Ok(())
}
