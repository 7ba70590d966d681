//! `make bench`: how many, how fast and how large, beside bare clients that share the machine in the same run.
//!
//! Each part starts what it needs on 127.0.0.1, in memory where syncs are not what is measured, and interleaves what it compares:
//! a round of one, a round of the other, three times over; what is printed are medians. The numbers are also left in
//! `target/bench.json`.

mod admission;
mod bare;
mod broker;
mod cosign;
mod dead_letters;
mod events;
#[cfg(feature = "kms")]
mod kms;
mod latency;
mod memory;
mod meter;
mod rabbitmq;
mod report;
mod requests;
mod rules;
mod signing;
mod stage;
mod wire;

use std::process::ExitCode;
use std::time::Instant;
use std::{env, fs};

use anyhow::{Context, Result};
use integration_tests::{daemon, process};

use crate::report::{Table, load_average, summary, target};

const PARTS: [&str; 12] = [
    "signing",
    "requests",
    "latency",
    "events",
    "memory",
    "rules",
    "rabbitmq-intake",
    "rabbitmq-signing",
    "dead-letters",
    "cosign",
    "admission",
    KMS,
];
/// Only with the feature of this name.
const KMS: &str = "kms";
const USAGE: &str = "usage: bench [--quick] [--only NAME]...
  exits with 1 if a number falls short of its aim, unless --quick
  --quick       small numbers and one round, to see that it works
  --only NAME   only this part: signing, requests, latency, events, memory, rules,
                rabbitmq-intake, rabbitmq-signing, dead-letters, cosign, admission or, with the feature kms, kms";

/// How much of it.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    pub quick: bool,
    pub rounds: usize,
}

impl Scale {
    /// This many, or some of them if it is to be quick.
    pub fn of(self, full: usize) -> usize {
        if self.quick { (full / 10).max(6) } else { full }
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let [verb, batch, milliseconds, folder] = &arguments[..]
        && verb == "bare-commits"
    {
        events::run_bare_commits(batch, milliseconds, folder)?;
        return Ok(ExitCode::SUCCESS);
    }
    let Some((scale, parts)) = read(&arguments) else {
        eprintln!("{USAGE}");
        return Ok(ExitCode::from(2));
    };
    #[cfg(feature = "kms")]
    if parts.contains(&KMS)
        && let Some(status) = kms::with_a_token()?
    {
        return Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    process::be_quiet();
    let begun = Instant::now();
    println!("{}; {} processors, load average {}", daemon::binary()?.display(), processors(), load_average());
    if cfg!(debug_assertions) {
        println!("This is not an optimised build: run `make bench`.");
    }
    let mut tables = Vec::new();
    for part in parts {
        let table = match part {
            "signing" => signing::measure(scale).await,
            "requests" => requests::measure(scale).await,
            "latency" => latency::measure(scale).await,
            "events" => events::measure(scale).await,
            "memory" => memory::measure(scale).await,
            "rules" => rules::measure(scale).await,
            "rabbitmq-intake" => rabbitmq::intake(scale).await,
            "rabbitmq-signing" => rabbitmq::signing(scale).await,
            "dead-letters" => dead_letters::measure(scale).await,
            "cosign" => cosign::measure(scale).await,
            "admission" => admission::measure(scale).await,
            #[cfg(feature = "kms")]
            KMS => kms::measure(scale).await,
            other => unreachable!("{other} is no part"),
        };
        tables.push(table.with_context(|| format!("measure {part}"))?);
    }
    let mut document = summary(&tables);
    document["quick"] = scale.quick.into();
    document["rounds"] = scale.rounds.into();
    document["processors"] = processors().into();
    document["seconds"] = begun.elapsed().as_secs().into();
    let path = target()?.join("bench.json");
    fs::write(&path, format!("{document:#}\n")).with_context(|| format!("write {}", path.display()))?;
    println!("\n{} s; the numbers are in {}", begun.elapsed().as_secs(), path.display());
    // Of small numbers nothing is to be learnt.
    let misses = !scale.quick && tables.iter().any(Table::misses);
    Ok(if misses { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn read(arguments: &[String]) -> Option<(Scale, Vec<&'static str>)> {
    let mut scale = Scale { quick: false, rounds: 3 };
    let parts: Vec<_> = PARTS.into_iter().filter(|part| *part != KMS || cfg!(feature = "kms")).collect();
    let mut only = Vec::new();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => scale = Scale { quick: true, rounds: 1 },
            "--only" => {
                let wanted = arguments.next()?;
                only.push(*parts.iter().find(|part| *part == wanted)?);
            }
            _ => return None,
        }
    }
    Some((scale, if only.is_empty() { parts } else { only }))
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}
