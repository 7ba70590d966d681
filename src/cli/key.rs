//! `countersign key`: local keys.

use std::process::ExitCode;

use serde_json::json;

use super::{KeyCommand, Output, Usage, output};
use crate::kms;

pub fn run(command: &KeyCommand, output: Output) -> anyhow::Result<ExitCode> {
    let KeyCommand::Generate { spec, out } = command;
    let spec = spec.parse().map_err(Usage)?;
    let public_key = kms::generate(spec, out)?;
    let uri = std::path::absolute(out).unwrap_or_else(|_| out.clone());
    let answer = json!({
        "key": format!("file://{}", uri.display()),
        "spec": spec.to_string(),
        "fingerprint": public_key.fingerprint(),
        "public_key": public_key.to_pem(),
    });
    output::print(output, &answer, |_| public_key.to_pem());
    if output == Output::Text {
        eprintln!("wrote {} (key = \"file://{}\" in a [[witness]])", out.display(), uri.display());
    }
    Ok(ExitCode::SUCCESS)
}
