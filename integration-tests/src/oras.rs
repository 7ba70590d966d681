//! oras, which attaches whatever its users want to an image, and lists what is attached. It makes no signatures.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Command;

use crate::process::{scratch, tool};
use crate::verifier::{must, run};

#[derive(Debug)]
pub struct Oras {
    folder: TempDir,
}

/// An artifact that refers to an image, as oras lists it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    /// Empty where the listing says none.
    pub artifact_type: String,
    pub digest: String,
}

impl Oras {
    pub fn new() -> Result<Self> {
        let folder = scratch()?;
        fs::write(folder.path().join("note.txt"), "approved by nobody\n")?;
        Ok(Self { folder })
    }

    /// `oras attach`: a small text of this artifact type.
    pub async fn attach(&self, artifact_type: &str, reference: &str) -> Result<()> {
        let mut command = self.command("attach")?;
        must(command.args(["--artifact-type", artifact_type, reference, "note.txt:text/plain"])).await
    }

    /// `oras discover`: whatever refers to the image, sorted.
    pub async fn discover(&self, reference: &str) -> Result<Vec<Listed>> {
        let said = run(self.command("discover")?.args(["--depth", "1", "--format", "json", reference])).await?;
        ensure!(said.accepted, "oras discover {reference}: {}", said.words);
        let answer: Value = serde_json::from_str(&said.words).with_context(|| format!("not JSON: {}", said.words))?;
        let listed = answer["referrers"].as_array().with_context(|| format!("no referrers in {answer}"))?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut listed: Vec<_> =
            listed.iter().map(|one| Listed { artifact_type: text(&one["artifactType"]), digest: text(&one["digest"]) }).collect();
        listed.sort();
        Ok(listed)
    }

    fn command(&self, verb: &str) -> Result<Command> {
        let mut command = Command::new(tool("bin/oras")?);
        let folder = self.folder.path();
        command.current_dir(folder).env("HOME", folder).env("DOCKER_CONFIG", folder).args([verb, "--plain-http"]);
        Ok(command)
    }
}
