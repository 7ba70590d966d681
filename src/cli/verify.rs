//! `countersign verify`: is this image attested, by whom, and if not, what is missing.

use std::process::ExitCode;

use anyhow::Context as _;
use serde::Serialize;

use super::{Output, Usage, VerifyArgs, output};
use crate::{
    app,
    clock::Clock,
    config::Config,
    oci::{Reference, Tag},
    verify::{Attestation, Depth, Evidence, Examination, Judgement, Known, Layout, Rejection, Trust, examine},
    witness::Witness,
};

/// The answer for one image.
#[derive(Debug, Serialize)]
struct Answer {
    attested: bool,
    /// Witnesses that were asked for and have not signed.
    missing: Vec<String>,
    /// What the KMSs said of signatures that stand by the public keys; absent unless they were asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    kms: Option<Vec<Remote>>,
    #[serde(flatten)]
    examination: Examination,
}

/// One signature that a KMS was to verify.
#[derive(Debug, Serialize)]
struct Remote {
    witness: String,
    /// Of the key.
    fingerprint: String,
    said: Said,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    Valid,
    Invalid,
    /// The public key decided alone: its provider does not verify, or the key is another one of the witness's than the one that signs.
    NotAsked,
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
    let mut kms = vec![];
    let mut known = vec![];
    for witness in asked {
        let theirs = if args.with_kms {
            let open = app::remote_witness(config, witness, clock).await?;
            let theirs = app::known_by(config, witness, open.trusted_keys().clone());
            kms.push(open);
            theirs
        } else {
            app::known(config, witness)?
        };
        known.push(app::with_certificates(config, witness, theirs, clock).await);
    }
    let trusts: Vec<Trust<'_>> = known.iter().map(Known::trust).collect();
    let mut answers = vec![];
    for reference in &args.references {
        let reference = parse_image(reference)?;
        let registry = app::registry_of(config, &reference.registry)?;
        let mut examination = examine(&registry, &reference, &trusts, clock.now(), Depth::Statements)
            .await
            .with_context(|| format!("{reference}: the registry could not be asked"))?;
        let kms = if args.with_kms { Some(confirm(&mut examination, &kms).await?) } else { None };
        let missing: Vec<String> = args.witness.iter().filter(|name| !examination.is_signed_by(name)).cloned().collect();
        let attested = examination.is_attested() && missing.is_empty();
        answers.push(Answer { attested, missing, kms, examination });
    }
    let all = answers.iter().all(|answer| answer.attested);
    output::print(output, &answers, |answers| answers.iter().map(render).collect::<Vec<_>>().join("\n"));
    Ok(if all { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Asks the KMSs about all signatures that stand. What they do not confirm does not count any more.
async fn confirm(examination: &mut Examination, witnesses: &[Witness]) -> anyhow::Result<Vec<Remote>> {
    let mut answers = vec![];
    for examined in &mut examination.signatures {
        let Judgement::Verified(verified) = &examined.verdict else { continue };
        let (name, fingerprint) = (verified.witness().to_owned(), verified.key_fingerprint().to_owned());
        let signer = witnesses.iter().find(|witness| witness.name() == name && witness.public_key().fingerprint() == fingerprint);
        let Evidence { algorithm, sha256, signature } = verified.evidence();
        let said = match signer {
            Some(witness) => witness.verify_remotely(*algorithm, sha256, signature).await?,
            None => None,
        };
        let said = match said {
            Some(true) => Said::Valid,
            Some(false) => Said::Invalid,
            None => Said::NotAsked,
        };
        if said == Said::Invalid {
            let message = format!("the KMS of witness {name} says that its key did not make it");
            let reference = verified.reference().map(ToOwned::to_owned);
            examined.verdict = Judgement::Rejected { witness: None, reference, reason: Rejection::UnknownKey, message };
            examined.also.clear();
        }
        answers.push(Remote { witness: name, fingerprint, said });
    }
    Ok(answers)
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
    for Remote { witness, fingerprint, said } in answer.kms.iter().flatten() {
        let key = &fingerprint[..16];
        text.push_str(&match said {
            Said::Valid => format!("\n  confirmed: by the KMS of witness {witness} (key {key})"),
            Said::Invalid => format!("\n  denied: by the KMS of witness {witness} (key {key})"),
            Said::NotAsked => format!("\n  not asked: no KMS verifies for witness {witness} (key {key}), its public key decided"),
        });
    }
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
        let layout = match signature.layout {
            Some(Layout::Oci11) => " as a referrer (oci-1-1), which cosign reads with --experimental-oci11 only",
            None => "",
        };
        let also = match &signature.also[..] {
            [] => String::new(),
            others => format!(" and by {}", others.join(" and by ")),
        };
        match &signature.verdict {
            Judgement::Verified(verified) => {
                text.push_str(&format!(
                    "\n  ok: {} signature {verified}{also} (key {}){layout}",
                    signature.format,
                    &verified.key_fingerprint()[..16]
                ));
            }
            Judgement::Rejected { witness, reference, message, .. } => {
                let by = witness.as_ref().map(|witness| format!(" by {witness}")).unwrap_or_default();
                let named = reference.as_ref().map(|named| format!(" of {}", named.escape_debug())).unwrap_or_default();
                text.push_str(&format!("\n  does not count: {} signature{by}{also}{named}{layout}, {message}", signature.format));
            }
        }
        if let Some(time) = signature.time {
            text.push_str(&format!(", said to be of {time}"));
        }
    }
    for Attestation { digest, predicate } in &examination.attestations {
        let predicate = predicate.escape_debug();
        text.push_str(&format!("\n  no signature: {digest} is an attestation, and states {predicate}"));
    }
    text
}
