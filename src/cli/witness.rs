//! `countersign witness`: who signs.

use std::process::ExitCode;

use anyhow::Context as _;
use serde::Serialize;

use super::{Output, Usage, WitnessCommand, output};
use crate::{
    app,
    clock::Clock,
    config::{self, Config},
};

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    description: String,
    key: String,
    spec: Option<String>,
    fingerprint: Option<String>,
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
            let answer = serde_json::json!({
                "witness": name,
                "certificate": chain.root_to_pem(),
                "chain": chain.to_pem(),
                "thumbprint": chain.thumbprint(),
                "trusted_identity": format!("x509.subject: {}", chain.subject()),
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
    let mut rows = vec![];
    for witness in &config.witnesses {
        let opened = app::public_key(config, witness, clock).await;
        let (key, error) = match opened {
            Ok(key) => (Some(key), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        rows.push(Row {
            name: witness.name.clone(),
            description: witness.description.clone(),
            key: witness.key.to_string(),
            spec: key.as_ref().map(|key| key.spec().to_string()),
            fingerprint: key.as_ref().map(|key| key.fingerprint().to_owned()),
            error,
        });
    }
    output::print(output, &rows, |rows| {
        let cells: Vec<Vec<String>> = rows
            .iter()
            .map(|row| {
                let state = row.error.clone().or_else(|| row.fingerprint.as_ref().map(|text| text[..16].to_owned()));
                vec![
                    row.name.clone(),
                    row.key.clone(),
                    row.spec.clone().unwrap_or_default(),
                    state.unwrap_or_default(),
                    row.description.clone(),
                ]
            })
            .collect();
        output::table(&["NAME", "KEY", "SPEC", "FINGERPRINT", "DESCRIPTION"], &cells)
    });
    Ok(if rows.iter().any(|row| row.error.is_some()) { ExitCode::from(3) } else { ExitCode::SUCCESS })
}
