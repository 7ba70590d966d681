//! A hundred thousand dead letters on RabbitMQ: listed in pages, and replayed by filter.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::daemon::{self, Metrics};
use integration_tests::house::{Keys, rule};
use integration_tests::process::{eventually, memory};
use integration_tests::rabbitmq::RabbitMq;
use integration_tests::registry::{Options, Registry};

use crate::Scale;
use crate::report::{Aim, Cell, Table, float, number, text};
use crate::stage::{Flood, Plan, Stage, post};
use crate::wire::{Until, Wire, Work, at_once};

/// Every second one is no notification; the others are of images that the registry does not show to us.
struct Deadly(Flood);

impl Work for Deadly {
    async fn one(&self, number: usize, wire: &mut Wire) -> Result<()> {
        let body = if number.is_multiple_of(2) { "no JSON".repeat(200).into() } else { self.0.event(number) };
        post(wire, body).await
    }
}

/// What a command may cost in memory, in MiB, however many there are: a hundred thousand of them are about a hundred MiB.
const FLAT: f64 = 40.0;
const PACED: &str = "replayed by filter at 1,000/s";
const RATE: u32 = 1000;

pub async fn measure(scale: Scale) -> Result<Table> {
    let columns = ["", "letters", "s", "per s", "of asked", "MiB: daemon before", "grew by", "command"];
    let mut table = Table::new("dead-letters", "Dead letters on RabbitMQ, listed and replayed", &columns);
    let letters = scale.of(100_000);
    let broker = RabbitMq::start().await?;
    let registry = Registry::start_with(Options { login: true, ..Options::default() }).await?;
    let queue = "backend = \"amqp\"\nurl = { env = \"AMQP_URL\" }\n".to_owned();
    let environment = vec![("AMQP_URL", broker.url())];
    let plan = Plan { queue, environment, ..Plan::new(registry.host(), 32, rule("bench", "bench", Keys::P256)) };
    let stage = Stage::start(plan).await?;
    let begun = Instant::now();
    let deadly = Arc::new(Deadly(Flood::new(&registry.host(), "bench/app")));
    at_once(stage.host(), 64, Until::Count(letters), &deadly).await.with_context(|| stage.log_end())?;
    let wanted = u64::try_from(letters)?;
    let buried = async || Ok((Box::pin(dead(&stage)).await?.0 == wanted).then_some(()));
    eventually("all are buried", Duration::from_secs(900), buried).await?;
    let row = |table: &mut Table, what: &str, count: usize, took: Duration, memory: Option<(f64, f64, f64)>| {
        let is_command = memory.is_some();
        let memory = memory.map_or([const { Cell::None }; 3], |(before, most, command)| {
            [number(before, 1), number(most - before, 1), number(command, 1)]
        });
        let rate = float(count) / took.as_secs_f64();
        let asked = if what == PACED { number(rate / float(RATE), 2) } else { Cell::None };
        let first = [text(what), number(float(count), 0), number(took.as_secs_f64(), 1), number(rate, 0), asked];
        table.row(first.into_iter().chain(memory));
        if is_command {
            table.aim("grew by", Aim::AtMost(FLAT), format!("{what}: MiB that the daemon grew by"));
            table.aim("command", Aim::AtMost(FLAT), format!("{what}: MiB of the command"));
        }
    };
    row(&mut table, "received, and buried", letters, begun.elapsed(), None);

    for what in ["listed", "listed again"] {
        let (took, memory, out) = watched(&stage, &["queue", "dead"]).await?;
        let listed = out.lines().filter(|line| line.contains(" s ago, after ")).count();
        ensure!(listed == letters, "{listed} of {letters} are listed");
        row(&mut table, what, letters, took, Some(memory));
    }
    let (count, before) = dead(&stage).await?;
    ensure!(count == wanted, "{count} of {letters} are left after listing");

    // Half of them, as fast as it goes; they die again, as they must.
    let (took, memory, out) = watched(&stage, &["queue", "replay", "--kind", "poison"]).await?;
    let replayed: usize = out.split_whitespace().nth(1).and_then(|word| word.parse().ok()).context(out)?;
    row(&mut table, "replayed by filter", replayed, took, Some(memory));
    let again = async || Ok((Box::pin(dead(&stage)).await?.0 == wanted).then_some(()));
    eventually("they are dead again", Duration::from_secs(900), again).await?;

    // The other half, no faster than asked; before the first, all are gone through once.
    let (rate, repository) = (RATE.to_string(), ["--repository", "bench/**"]);
    let arguments = [&["queue", "replay", "--rate", &rate][..], &repository].concat();
    let (took, memory, out) = watched(&stage, &arguments).await?;
    let replayed: usize = out.split_whitespace().nth(1).and_then(|word| word.parse().ok()).context(out)?;
    ensure!(replayed == letters / 2, "{replayed} of {letters} are replayed");
    row(&mut table, PACED, replayed, took, Some(memory));
    table.aim("of asked", Aim::AtMost(1.02), "dead letters replayed a second, of the rate that was asked for, at most");
    table.aim("of asked", Aim::AtLeast(0.8), "dead letters replayed a second, of the rate that was asked for, at least");
    eventually("they are dead again", Duration::from_secs(900), again).await?;
    let after = dead(&stage).await?.1;
    ensure!(after.received() == before.received() && after.adds_up(), "the sums do not add up");
    table.note("each command's own memory and the daemon's are the most that was seen while it ran; replaying lists first, and reads twice");
    table.close();
    Ok(table)
}

async fn dead(stage: &Stage) -> Result<(u64, Metrics)> {
    let metrics = stage.metrics(&mut Wire::open(stage.host()).await?).await?;
    Ok((metrics.count("countersign_queue_messages", &[("state", "dead")]), metrics))
}

/// Runs a command of countersign's: how long it took, what the daemon had before and at most meanwhile, and what the command
/// had at most, in MiB; and what it printed.
async fn watched(stage: &Stage, arguments: &[&str]) -> Result<(Duration, (f64, f64, f64), String)> {
    let (daemon, before) = (stage.pid()?, memory(stage.pid()?, "VmRSS")?);
    let mut command = tokio::process::Command::new(daemon::binary()?);
    command.args(arguments).arg("--config").arg(stage.config()).envs(stage.environment()).stdin(Stdio::null());
    let begun = Instant::now();
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn()?;
    let pid = child.id().context("it ended at once")?;
    let over = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&over);
    #[expect(clippy::disallowed_methods, reason = "it is waited for below")]
    let watching = tokio::spawn(async move {
        let (mut most, mut own) = (before, 0.0_f64);
        while !ended.load(Ordering::Relaxed) {
            most = most.max(memory(daemon, "VmRSS").unwrap_or_default());
            own = own.max(memory(pid, "VmHWM").unwrap_or_default());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        (most, own)
    });
    let output = child.wait_with_output().await?;
    let took = begun.elapsed();
    over.store(true, Ordering::Relaxed);
    let (most, own) = watching.await?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok((took, (before, most, own), String::from_utf8_lossy(&output.stdout).into_owned()))
}
