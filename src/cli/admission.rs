//! `countersign admission --ca-bundle` and `--crds`.

use std::process::ExitCode;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::Serialize;

use super::{Output, output};
use crate::{admission, app, clock::Clock, config::Config};

#[derive(Debug, Serialize)]
struct Bundle {
    /// Base64 of PEM, as a webhook's `clientConfig` has it.
    ca_bundle: String,
    pem: String,
}

/// Prints what the API server has to trust.
pub fn print_ca_bundle(config: &Config, clock: &Clock, output: Output) -> anyhow::Result<ExitCode> {
    let pem = app::ca_bundle(config, clock)?;
    output::print(output, &Bundle { ca_bundle: BASE64.encode(&pem), pem }, |bundle| bundle.ca_bundle.clone());
    Ok(ExitCode::SUCCESS)
}

/// Prints the definitions of the custom resources, as one manifest.
pub fn print_crds(output: Output) -> ExitCode {
    output::print(output, &admission::definitions(), |_| admission::definitions_manifest());
    ExitCode::SUCCESS
}
