//! `countersign check`: is this configuration good, and with `--online`, does all that it names answer.

use std::process::ExitCode;

use serde::Serialize;
use serde_json::{Value, json};

use super::{CheckArgs, Output, output};
use crate::{
    app,
    clock::Clock,
    config::{Config, DEFAULT_TOML, Ledger, Problem, Problems, in_full, schema},
    witness::Probed,
};

#[derive(Debug, Serialize)]
struct Answer {
    ok: bool,
    problems: Vec<Value>,
    online: Vec<Reached>,
}

/// One thing that was asked.
#[derive(Debug, Serialize)]
struct Reached {
    what: String,
    ok: bool,
    error: Option<String>,
}

/// `loaded` is what loading the configuration gave.
pub async fn run(
    loaded: Result<(Config, Vec<Problem>), Problems>,
    clock: &Clock,
    args: &CheckArgs,
    output: Output,
) -> anyhow::Result<ExitCode> {
    let (config, problems) = match loaded {
        Ok((config, warnings)) => (Some(config), warnings),
        Err(problems) => (None, problems.iter().cloned().collect()),
    };
    let mut answer = Answer { ok: config.is_some(), problems: problems.iter().map(Problem::to_json).collect(), online: vec![] };
    if let Some(config) = &config {
        if args.online {
            answer.online = online(config, clock).await;
        } else {
            answer.online = certificates(config, clock);
            answer.ok = answer.online.iter().all(|certificate| certificate.ok);
        }
    }
    let unreached = answer.online.iter().any(|reached| !reached.ok);
    output::print(output, &answer, |answer| {
        let mut text = in_full(&problems);
        if !text.is_empty() {
            text.push('\n');
        }
        for reached in &answer.online {
            match &reached.error {
                None => text.push_str(&format!("ok: {}\n", reached.what)),
                Some(error) => text.push_str(&format!("failed: {}: {error}\n", reached.what)),
            }
        }
        if answer.ok && !unreached {
            text.push_str("the configuration is good");
        }
        text
    });
    Ok(match (answer.ok, unreached) {
        (false, _) => ExitCode::from(1),
        (true, true) => ExitCode::from(3),
        (true, false) => ExitCode::SUCCESS,
    })
}

/// Prints what needs no configuration.
pub fn print_reference(args: &CheckArgs) -> bool {
    let text = if args.schema {
        serde_json::to_string_pretty(&schema()).expect("a schema is plain data")
    } else if args.defaults {
        DEFAULT_TOML.to_owned()
    } else {
        return false;
    };
    output::print(Output::Text, &json!(null), |_| text);
    true
}

async fn online(config: &Config, clock: &Clock) -> Vec<Reached> {
    let mut all = vec![];
    for registry in &config.registries {
        let reached = async { anyhow::Ok(app::registry_of(config, &registry.name)?.ping().await?) }.await;
        all.push(reached_or(format!("registry {}", registry.name), reached));
    }
    if let Ledger::Postgres(settings) = &config.ledger {
        let reached = settings.look().await.map_err(anyhow::Error::from);
        all.push(reached_or(format!("ledger {}", settings.place()), reached));
    }
    all.push(reached_or("the queue".to_owned(), app::reach_queue(config, clock).await));
    all.extend(app::reach_feeds(config).await.into_iter().map(|(what, reached)| reached_or(what, reached)));
    for witness in &config.witnesses {
        let probed = app::probe(config, witness, clock).await;
        let how = match probed {
            Ok(Probed::DryRun) => "may sign, by a dry run,",
            Ok(Probed::Signed) | Err(_) => "signs a probe",
        };
        all.push(reached_or(format!("witness {} {how} with {}", witness.name, witness.key), probed.map(drop)));
    }
    all
}

/// What can be told without asking a KMS: whether certificates are for the keys that are known here. Online, the probe does it.
fn certificates(config: &Config, clock: &Clock) -> Vec<Reached> {
    let certified = config.witnesses.iter().filter(|witness| witness.certificate.is_some());
    let checked = certified.filter_map(|witness| {
        let known = app::known(config, witness).ok()?;
        let result = app::check_certificate(witness, known.keys.own()?, clock);
        Some(reached_or(format!("certificate of witness {}", witness.name), result))
    });
    checked.collect()
}

fn reached_or(what: String, result: anyhow::Result<()>) -> Reached {
    let error = result.err().map(|error| format!("{error:#}"));
    Reached { what, ok: error.is_none(), error }
}
