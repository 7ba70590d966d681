//! From the answer 202 to the word "signed", beside the bare requests, one at a time and turn by turn.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::house::{Keys, rule};
use integration_tests::registry::Registry;

use crate::Scale;
use crate::bare::Writes;
use crate::report::{Aim, Table, median, milliseconds, number, percentile, text};
use crate::stage::{Plan, Pushed, Stage, post};
use crate::wire::{Wire, Work as _};

pub async fn measure(scale: Scale) -> Result<Table> {
    let title = "From 202 to signed beside the bare write, one at a time (ms)";
    let mut table = Table::new("latency", title, &["", "p50", "p99"]);
    let registry = Registry::start().await?;
    let client = registry.client()?;
    let stage = Stage::start(Plan::new(registry.host(), 1, rule("bench", "bench", Keys::P256))).await?;
    let images = scale.of(250);
    let (mut ours, mut bare, mut answers) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..scale.rounds {
        let signed = Pushed::push(&client, &format!("bench/ours{round}"), images).await?;
        let written = Pushed::push(&client, &format!("bench/bare{round}"), images).await?;
        let writes = Arc::new(Writes::prepare(&client, &registry.host(), &written, Keys::P256).await?);
        let (mut to_daemon, mut to_registry) = (Wire::open(stage.host()).await?, Wire::open(&registry.host()).await?);
        let mut log = Follower::at_end(&stage.log())?;
        let mut times = [Vec::new(), Vec::new(), Vec::new()];
        for (number, event) in signed.events(&registry.host()).into_iter().enumerate() {
            let begun = Instant::now();
            writes.one(number, &mut to_registry).await?;
            times[0].push(begun.elapsed());

            let begun = Instant::now();
            post(&mut to_daemon, event).await?;
            let answered = Instant::now();
            let digest = signed.manifests[number].digest.clone();
            log = tokio::task::spawn_blocking(move || log.wait_for(&digest)).await??;
            times[1].push(answered.elapsed());
            times[2].push(answered - begun);
        }
        // The first signature of a repository uploads the config that all share.
        for times in &mut times {
            times.remove(0);
        }
        for (all, times) in [&mut bare, &mut ours, &mut answers].into_iter().zip(&mut times) {
            all.push((percentile(times, 0.5), percentile(times, 0.99)));
        }
        stage.check(&client, &signed, &[0, images / 2, images - 1]).await?;
    }
    let middle = |all: &[(Duration, Duration)], pick: fn(&(Duration, Duration)) -> Duration| {
        Duration::from_secs_f64(median(all.iter().map(|both| pick(both).as_secs_f64())))
    };
    let mut row = |what: &str, all: &[(Duration, Duration)]| {
        table.row([text(what), milliseconds(middle(all, |both| both.0)), milliseconds(middle(all, |both| both.1))]);
    };
    row("202 to signed", &ours);
    row("bare write", &bare);
    row("event to 202", &answers);
    let added = |pick: fn(&(Duration, Duration)) -> Duration| {
        let difference = |(ours, bare): (&_, &_)| pick(ours).as_secs_f64() - pick(bare).as_secs_f64();
        number(1e3 * median(ours.iter().zip(&bare).map(difference)), 2)
    };
    table.row([text("added (difference)"), added(|both| both.0), added(|both| both.1)]);
    table.aim("p50", Aim::AtMost(2.0), "added latency from 202 to signed, p50 in ms");
    table.note("signed: the daemon's log says so, which it does when it has read the signature back; seen within 0.1 ms");
    table.note(format!("{images} of each a round, one of each in turn"));
    table.close();
    Ok(table)
}

/// Reads a log while it grows.
struct Follower {
    file: File,
    unread: String,
}

impl Follower {
    fn at_end(log: &Path) -> Result<Self> {
        let mut file = File::open(log).with_context(|| format!("open {}", log.display()))?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self { file, unread: String::new() })
    }

    /// Blocks until a line says that this digest is signed.
    fn wait_for(mut self, digest: &str) -> Result<Self> {
        const LIMIT: Duration = Duration::from_secs(30);
        let begun = Instant::now();
        loop {
            self.file.read_to_string(&mut self.unread)?;
            let whole = self.unread.rfind('\n').map_or(0, |end| end + 1);
            let is_signed = |line: &str| line.contains("outcome=signed") && line.contains(digest);
            let found = self.unread[..whole].lines().any(is_signed);
            self.unread.drain(..whole);
            if found {
                return Ok(self);
            }
            ensure!(begun.elapsed() < LIMIT, "the log does not say within {LIMIT:?} that {digest} is signed");
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}
