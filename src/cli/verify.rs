//! `countersign verify`: is this image attested, by whom, and if not, what is missing.

use std::process::ExitCode;

use anyhow::Context as _;
use futures::future::try_join_all;
use serde::Serialize;

use super::{Output, Usage, VerifyArgs, output};
use crate::{
    app,
    clock::Clock,
    config::Config,
    oci::{Reference, Tag},
    verify::{Examination, Judgement, Known, Trust, examine},
};

/// The answer for one image.
#[derive(Debug, Serialize)]
struct Answer {
    attested: bool,
    /// Witnesses that were asked for and have not signed.
    missing: Vec<String>,
    #[serde(flatten)]
    examination: Examination,
}

pub async fn run(config: &Config, clock: &Clock, args: &VerifyArgs, output: Output) -> anyhow::Result<ExitCode> {
    for name in &args.witness {
        if !config.witnesses.iter().any(|witness| witness.name == *name) {
            let known: Vec<_> = config.witnesses.iter().map(|witness| witness.name.as_str()).collect();
            return Err(Usage(format!("no witness is named {name}; the configuration has {}", known.join(", "))).into());
        }
    }
    // Others are not looked at: that their keys are not known here yet is no reason not to answer.
    let asked = config.witnesses.iter().filter(|witness| args.witness.is_empty() || args.witness.contains(&witness.name));
    let known = try_join_all(asked.map(|witness| app::known_with_certificates(config, witness, clock))).await?;
    let trusts: Vec<Trust<'_>> = known.iter().map(Known::trust).collect();
    let mut answers = vec![];
    for reference in &args.references {
        let reference = parse_image(reference)?;
        let registry = app::registry_of(config, &reference.registry)?;
        let examination = examine(&registry, &reference, &trusts, clock.now())
            .await
            .with_context(|| format!("{reference}: the registry could not be asked"))?;
        let signed_by = |name: &String| examination.verified().any(|verified| verified.witness() == name);
        let missing: Vec<String> = args.witness.iter().filter(|name| !signed_by(name)).cloned().collect();
        let attested = examination.is_attested() && missing.is_empty();
        answers.push(Answer { attested, missing, examination });
    }
    let all = answers.iter().all(|answer| answer.attested);
    output::print(output, &answers, |answers| answers.iter().map(render).collect::<Vec<_>>().join("\n"));
    Ok(if all { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// A reference with a tag or a digest; without either it means `:latest`, as it does to every client.
pub(super) fn parse_image(text: &str) -> Result<Reference, Usage> {
    let mut reference: Reference = text.parse().map_err(|error| Usage(format!("{text}: {error}")))?;
    if reference.tag.is_none() && reference.digest.is_none() {
        reference.tag = Some(Tag::latest());
    }
    Ok(reference)
}

fn render(answer: &Answer) -> String {
    let examination = &answer.examination;
    let reference = &examination.reference;
    let Some(digest) = &examination.digest else {
        return format!("image {reference} is not attested\n  the registry has no such image");
    };
    let mut text =
        if answer.attested { format!("image {reference} is attested") } else { format!("image {reference} is not attested") };
    text.push_str(&format!("\n  digest {digest}"));
    text.push_str(&render_signatures(examination));
    for witness in &answer.missing {
        text.push_str(&format!("\n  missing: a signature of witness {witness}"));
    }
    text
}

/// What is there, a line each.
pub(super) fn render_signatures(examination: &Examination) -> String {
    let mut text = String::new();
    if let Some(unreadable) = &examination.unreadable {
        text.push_str(&format!("\n  {unreadable}"));
    }
    if examination.unreadable.is_none() && examination.signatures.is_empty() && examination.digest.is_some() {
        text.push_str("\n  it has no signatures");
    }
    for signature in &examination.signatures {
        match &signature.verdict {
            Judgement::Verified(verified) => {
                text.push_str(&format!(
                    "\n  ok: {} signature {verified} (key {})",
                    signature.format,
                    &verified.key_fingerprint()[..16]
                ));
            }
            Judgement::Rejected { witness, message, .. } => {
                let by = witness.as_ref().map(|witness| format!(" by {witness}")).unwrap_or_default();
                text.push_str(&format!("\n  does not count: {} signature{by}, {message}", signature.format));
            }
        }
        if let Some(time) = signature.time {
            text.push_str(&format!(", said to be of {time}"));
        }
    }
    text
}
