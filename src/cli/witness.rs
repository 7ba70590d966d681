//! `countersign witness`: who signs.

use std::process::ExitCode;

use anyhow::Context as _;
use serde::Serialize;

use super::{Client, Output, Usage, WitnessCommand, output};
use crate::{
    admin::WitnessView,
    app,
    clock::Clock,
    config::{self, Config},
    kms::{Algorithm, PublicKey},
    witness::{AwayView, LastError, Quota, Status},
};

/// A witness. What is absent is not known: of a daemon that does not run there is no quota, no error and no breaker.
#[derive(Debug, Default, Serialize)]
struct Row {
    name: String,
    description: String,
    key: String,
    /// `aws`, `alibaba`, …: the scheme of the key's URI tells.
    provider: String,
    /// What the KMS calls the key.
    resolved: Option<String>,
    spec: Option<String>,
    algorithms: Vec<&'static str>,
    /// SHA-256 of the public key (SPKI, DER), hex.
    fingerprint: Option<String>,
    /// Of the running daemon's witness, as [`Status::state`] has it; `shut` if its key is not open; `not running`.
    state: String,
    breaker: Option<&'static str>,
    away: Option<AwayView>,
    quota: Option<Quota>,
    last_signed: Option<jiff::Timestamp>,
    last_error: Option<LastError>,
    /// Why its public key could not be had.
    error: Option<String>,
}

pub async fn run(config: &Config, clock: &Clock, command: &WitnessCommand, output: Output) -> anyhow::Result<ExitCode> {
    match command {
        WitnessCommand::List => list(config, clock, output).await,
        WitnessCommand::PublicKey { name } => {
            let pem = app::public_key(config, named(config, name)?, clock).await?.to_pem();
            output::print(output, &serde_json::json!({ "witness": name, "public_key": pem }), |_| pem.clone());
            Ok(ExitCode::SUCCESS)
        }
        WitnessCommand::Certificate { name, renew } => {
            let certificates = app::certificates(config, named(config, name)?, clock, *renew).await?;
            let chain = certificates.first().context("there is no certificate")?;
            if let Some(why) = chain.nameless() {
                eprintln!(
                    "warning: the certificate's subject ({}) {why}: no trust policy of notation's can name it, and one that trusts \
                     everybody (\"*\") trusts whomever its root certifies",
                    chain.subject()
                );
            }
            let answer = serde_json::json!({
                "witness": name,
                "certificate": chain.root_to_pem(),
                "chain": chain.to_pem(),
                "thumbprint": chain.thumbprint(),
                "trusted_identity": chain.trusted_identity(),
                "not_before": chain.not_before(),
                "not_after": chain.not_after(),
            });
            output::print(output, &answer, |_| chain.root_to_pem().trim_end().to_owned());
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn named<'a>(config: &'a Config, name: &str) -> Result<&'a config::Witness, Usage> {
    config.witnesses.iter().find(|witness| witness.name == *name).ok_or_else(|| {
        let known: Vec<_> = config.witnesses.iter().map(|witness| witness.name.as_str()).collect();
        Usage(format!("no witness is named {name}; the configuration has {}", known.join(", ")))
    })
}

async fn list(config: &Config, clock: &Clock, output: Output) -> anyhow::Result<ExitCode> {
    let running = match Client::daemon(app::state_folder(config)).await? {
        Some(daemon) => Some(daemon.get::<_, Vec<WitnessView>>("/api/v1/witnesses", &()).await?),
        None => None,
    };
    let mut rows = vec![];
    for witness in &config.witnesses {
        let view = running.as_ref().and_then(|views| views.iter().find(|view| view.name == witness.name));
        rows.push(match (view, &running) {
            (Some(view), _) => of_daemon(witness, view.clone())?,
            (None, Some(_)) => Row { state: "shut".to_owned(), ..offline(config, witness, clock).await },
            (None, None) => Row { state: "not running".to_owned(), ..offline(config, witness, clock).await },
        });
    }
    output::print(output, &rows, |rows| render(rows));
    Ok(if rows.iter().any(|row| row.error.is_some()) { ExitCode::from(3) } else { ExitCode::SUCCESS })
}

fn of_daemon(witness: &config::Witness, view: WitnessView) -> anyhow::Result<Row> {
    let Status { state, away, quota, last_signed, last_error } = view.status;
    let key = PublicKey::from_pem(&view.public_key)?;
    Ok(Row {
        resolved: Some(view.resolved),
        algorithms: view.algorithms.into_iter().map(Algorithm::name).collect(),
        breaker: Some(if away.is_some() { "open" } else { "closed" }),
        state,
        away,
        quota: Some(quota),
        last_signed,
        last_error,
        ..row(witness, Ok(key))
    })
}

async fn offline(config: &Config, witness: &config::Witness, clock: &Clock) -> Row {
    row(witness, app::public_key(config, witness, clock).await)
}

fn row(witness: &config::Witness, key: anyhow::Result<PublicKey>) -> Row {
    let (key, error) = match key {
        Ok(key) => (Some(key), None),
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    let can = |algorithm: &Algorithm| key.as_ref().is_some_and(|key| key.spec().supports(*algorithm));
    let uri = witness.key.to_string();
    Row {
        name: witness.name.clone(),
        description: witness.description.clone(),
        provider: uri.split(':').next().unwrap_or_default().to_owned(),
        key: uri,
        spec: key.as_ref().map(|key| key.spec().to_string()),
        algorithms: Algorithm::ALL.into_iter().filter(can).map(Algorithm::name).collect(),
        fingerprint: key.as_ref().map(|key| key.fingerprint().to_owned()),
        error,
        ..Row::default()
    }
}

/// A table, and below it what went wrong.
fn render(rows: &[Row]) -> String {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                row.name.clone(),
                row.state.clone(),
                row.spec.clone().unwrap_or_default(),
                row.algorithms.join(" "),
                row.fingerprint.as_ref().map(|text| text[..16].to_owned()).unwrap_or_default(),
                row.quota.as_ref().map(used).unwrap_or_default(),
                row.key.clone(),
                row.description.clone(),
            ]
        })
        .collect();
    let headings = ["NAME", "STATE", "SPEC", "ALGORITHMS", "FINGERPRINT", "QUOTA", "KEY", "DESCRIPTION"];
    let mut text = output::table(&headings, &cells);
    for row in rows {
        if let Some(error) = &row.error {
            text.push_str(&format!("\n{}: {error}", row.name));
        }
        if let Some(AwayView { since, next }) = &row.away {
            text.push_str(&format!("\n{}: its KMS has been away since {since}, and is tried again at {next}", row.name));
        }
        if let Some(LastError { at, message, .. }) = &row.last_error {
            text.push_str(&format!("\n{}: last error at {at}: {message}", row.name));
        }
    }
    text
}

/// `4.8 of 5/s, 12 waiting`
fn used(quota: &Quota) -> String {
    let mut text = match quota.per_second {
        Some(most) => format!("{:.1} of {most:.1}/s", quota.served),
        None => format!("{:.1}/s", quota.served),
    };
    if quota.waiting > 0 {
        text.push_str(&format!(", {} waiting", quota.waiting));
    }
    text
}
