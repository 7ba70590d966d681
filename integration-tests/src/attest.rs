//! cosign's other writers: attestations, and what was made elsewhere and is attached.

use std::fs;

use anyhow::{Result, ensure};

use crate::process::scratch;
use crate::verifier::{Cosign, KeyPair, must, run};

/// What [`Cosign::attest`] states.
pub const PREDICATE: &str = "https://slsa.dev/provenance/v1";

impl Cosign {
    /// `cosign attest`: under the `.att` tag, or as cosign 3 does it, as a bundle that refers to the image.
    pub async fn attest(self, key: &KeyPair, reference: &str) -> Result<()> {
        let folder = scratch()?;
        let predicate = folder.path().join("predicate.json");
        fs::write(&predicate, r#"{"buildDefinition": {}, "runDetails": {}}"#)?;
        let mut command = self.command(folder.path(), "attest")?;
        command.args(["--yes", "--tlog-upload=false", "--allow-http-registry", "--type", PREDICATE]);
        if self == Self::V3 {
            command.arg("--use-signing-config=false");
        }
        must(command.arg("--predicate").arg(predicate).arg("--key").arg(key.private()).arg(reference)).await
    }

    /// `cosign attach attestation`, of one that [`Self::attest`] has left under the `.att` tag of `from`.
    pub async fn attach_attestation(from: &str, reference: &str) -> Result<()> {
        let folder = scratch()?;
        let mut command = Self::V2.command(folder.path(), "download")?;
        let found = run(command.args(["attestation", "--allow-http-registry", from])).await?;
        ensure!(found.accepted, "cosign download attestation: {}", found.words);
        let attestation = folder.path().join("attestation.json");
        fs::write(&attestation, found.words)?;
        let mut command = Self::V2.command(folder.path(), "attach")?;
        must(command.args(["attestation", "--allow-http-registry", "--attestation"]).arg(attestation).arg(reference)).await
    }

    /// `cosign attach sbom`: under the `.sbom` tag.
    pub async fn attach_sbom(reference: &str) -> Result<()> {
        let folder = scratch()?;
        let sbom = folder.path().join("sbom.spdx.json");
        fs::write(&sbom, r#"{"spdxVersion": "SPDX-2.3"}"#)?;
        let mut command = Self::V2.command(folder.path(), "attach")?;
        must(command.args(["sbom", "--type", "spdx", "--allow-http-registry", "--sbom"]).arg(sbom).arg(reference)).await
    }

    /// `cosign attach signature`: one that was made without a registry, under the `.sig` tag.
    pub async fn attach_signature(key: &KeyPair, reference: &str) -> Result<()> {
        let folder = scratch()?;
        let (payload, signature) = (folder.path().join("payload.json"), folder.path().join("signature"));
        let mut command = Self::V2.command(folder.path(), "generate")?;
        let made = run(command.args(["--allow-http-registry", reference])).await?;
        ensure!(made.accepted, "cosign generate: {}", made.words);
        fs::write(&payload, made.words)?;
        let mut command = Self::V2.command(folder.path(), "sign-blob")?;
        command.args(["--yes", "--tlog-upload=false", "--key"]).arg(key.private()).arg("--output-signature").arg(&signature);
        must(command.arg(&payload)).await?;
        let mut command = Self::V2.command(folder.path(), "attach")?;
        command.args(["signature", "--allow-http-registry", "--payload"]).arg(payload).arg("--signature").arg(signature);
        must(command.arg(reference)).await
    }
}
