//! `countersign copy-signatures`: takes an image's signatures along to where the image has been copied to.

use std::process::ExitCode;

use serde_json::json;

use super::{CopySignaturesArgs, Output, Usage, output, verify::parse_image};
use crate::{
    app,
    config::Config,
    copy::{self, Copied, Copies, Place, State},
};

pub async fn run(config: &Config, args: &CopySignaturesArgs, output: Output) -> anyhow::Result<ExitCode> {
    let (source, destination) = (parse_image(&args.source)?, parse_image(&args.destination)?);
    if source.name() == destination.name() {
        let problem = "both are in the same repository, where a digest's signatures are those of each of its tags";
        return Err(Usage(format!("{source}, {destination}: {problem}")).into());
    }
    let registries = (app::registry_of(config, &source.registry)?, app::registry_of(config, &destination.registry)?);
    let from = Place { registry: &registries.0, reference: &source };
    let to = Place { registry: &registries.1, reference: &destination };
    match copy::copy(from, to, args.dry_run).await {
        Ok(copies) => {
            output::print(output, &copies, render);
            Ok(ExitCode::from(code(&copies)))
        }
        Err(error) if error.is_answer() => {
            output::print(output, &json!({ "error": error.to_string() }), |_| error.to_string());
            Ok(ExitCode::from(1))
        }
        Err(error) => Err(error.into()),
    }
}

fn code(copies: &Copies) -> u8 {
    let failed = |copied: &Copied| match copied.state {
        State::Failed { retry: true, .. } => 3,
        State::Failed { retry: false, .. } => 1,
        State::Copied | State::Present | State::Missing | State::LeftOut { .. } => 0,
    };
    copies.signatures.iter().map(failed).max().unwrap_or_default()
}

fn render(copies: &Copies) -> String {
    let Copies { source, destination, digest, signatures } = copies;
    let mut text = format!("{source} to {destination}\n  digest {digest}");
    if signatures.is_empty() {
        text.push_str("\n  it has no signatures");
    }
    for copied in signatures {
        let Copied { digest: signed, format, reference, approves_destination, state } = copied;
        let (word, why) = match state {
            State::Copied => ("copied", String::new()),
            State::Present => ("there already", String::new()),
            State::Missing => ("would be copied", String::new()),
            State::LeftOut { reason } => ("left out", format!(": {reason}")),
            State::Failed { error, .. } => ("failed", format!(": {error}")),
        };
        let of = if signed == digest { String::new() } else { format!(" of {signed}") };
        let approves = match reference {
            None if *approves_destination => "approves the digest".to_owned(),
            None => "approves what cannot be read".to_owned(),
            Some(name) if *approves_destination => format!("approves {name}"),
            Some(name) => format!("approves {name} only"),
        };
        text.push_str(&format!("\n  {word}: {} signature{of}, {approves}{why}", format.name()));
    }
    text
}
