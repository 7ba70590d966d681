//! `countersign key`: local keys.

use std::process::ExitCode;

use serde_json::json;

use super::{KeyCommand, Output, Usage, output};
use crate::kms::{self, Environment, SecretSource};

pub fn run(command: &KeyCommand, output: Output) -> anyhow::Result<ExitCode> {
    let KeyCommand::Generate { spec, out, passphrase_file } = command;
    let spec = spec.parse().map_err(Usage)?;
    let public_key = match passphrase_file {
        None => kms::generate(spec, out)?,
        Some(path) => {
            let passphrase = SecretSource::File(path.clone()).read_line(&Environment::system());
            kms::generate_encrypted(spec, out, &passphrase.map_err(anyhow::Error::msg)?)?
        }
    };
    let uri = std::path::absolute(out).unwrap_or_else(|_| out.clone());
    let answer = json!({
        "key": format!("file://{}", uri.display()),
        "spec": spec.to_string(),
        "fingerprint": public_key.fingerprint(),
        "public_key": public_key.to_pem(),
    });
    output::print(output, &answer, |_| public_key.to_pem());
    if output == Output::Text {
        let and = if passphrase_file.is_some() { ", with its passphrase" } else { "" };
        eprintln!("wrote {} (key = \"file://{}\" in a [[witness]]{and})", out.display(), uri.display());
    }
    Ok(ExitCode::SUCCESS)
}
