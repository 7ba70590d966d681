//! `countersign sign`: signs now, by the rules.

use std::process::ExitCode;

use anyhow::Context as _;
use serde::Serialize;

use super::{Client, Output, SignArgs, Usage, output, queue::progress, verify::parse_image};
use crate::{
    admin::{SignAnswer, SignRequest},
    app,
    clock::Clock,
    config::Config,
    oci::{Reference, Repository, Tag},
    registry::{Address, Registry},
    rule::{Occasion, Scope, Trigger},
};

#[derive(Debug, Serialize)]
struct Answer {
    reference: Reference,
    /// The rules that sign it.
    rules: Vec<String>,
    #[serde(flatten)]
    result: Option<SignAnswer>,
}

pub async fn run(config: &Config, client: &Client, clock: &Clock, args: &SignArgs, output: Output) -> anyhow::Result<ExitCode> {
    let rules = app::rules(config)?;
    let mut images = vec![];
    for reference in &args.references {
        if args.recursive {
            images.extend(namespace(config, reference).await?);
        } else {
            images.push(parse_image(reference)?);
        }
    }
    let bar = if args.recursive { progress(images.len() as u64, "signing") } else { indicatif::ProgressBar::hidden() };
    let mut answers = vec![];
    for reference in images {
        let matches = rules.matching(&Occasion {
            registry: &reference.registry,
            repository: &reference.repository,
            tag: reference.tag.as_ref(),
            pushed_at: clock.now(),
            trigger: Trigger::Manual,
        });
        let names = matches.matched.iter().map(|rule| rule.name.clone()).collect();
        let result = if args.dry_run { None } else { Some(sign(config, client, &reference).await?) };
        answers.push(Answer { reference, rules: names, result });
        bar.inc(1);
    }
    bar.finish_and_clear();
    let failed = |answer: &&Answer| {
        answer.result.as_ref().is_some_and(|result| !matches!(result.outcome.as_str(), "signed" | "already_signed"))
    };
    // A namespace holds images that no rule wants; an image that was named is wanted.
    let code = match answers.iter().filter(failed).filter_map(|answer| answer.result.as_ref()).collect::<Vec<_>>() {
        failures if failures.is_empty() => 0,
        failures if failures.iter().any(|failure| failure.retry) => 3,
        failures if args.recursive && failures.iter().all(|failure| failure.outcome == "skipped") => 0,
        _ => 1,
    };
    output::print(output, &answers, |answers| answers.iter().map(render).collect::<Vec<_>>().join("\n"));
    Ok(ExitCode::from(code))
}

async fn sign(config: &Config, client: &Client, reference: &Reference) -> anyhow::Result<SignAnswer> {
    let registry = app::registry_of(config, &reference.registry)?;
    let digest = match (&reference.digest, &reference.tag) {
        (Some(digest), _) => {
            let manifest = registry.manifest(&reference.repository, &Address::Digest(digest.clone())).await?;
            manifest.map(|manifest| manifest.digest().clone())
        }
        (None, tag) => registry.resolve(&reference.repository, tag.as_ref().unwrap_or(&Tag::latest())).await?,
    };
    let Some(digest) = digest else {
        return Ok(SignAnswer {
            outcome: "skipped".into(),
            reason: Some("the registry has no such image".into()),
            rules: vec![],
            signatures: vec![],
            error: None,
            retry: false,
        });
    };
    let request = SignRequest {
        registry: reference.registry.clone(),
        repository: reference.repository.clone(),
        tag: reference.tag.clone(),
        digest,
    };
    client.post("/api/v1/sign", &request).await
}

/// Every tag of every repository in a namespace, `host/namespace` or `host` alone. Attachments' tags are not images.
async fn namespace(config: &Config, text: &str) -> anyhow::Result<Vec<Reference>> {
    let (host, path) = text.split_once('/').unwrap_or((text, ""));
    let host = host.parse().map_err(|error| Usage(format!("{text}: {error}")))?;
    let scope = match path.trim_end_matches('/') {
        "" => None,
        path => Some(Scope::parse(path).map_err(|error| Usage(format!("{text}: {error}")))?),
    };
    let registry = app::registry_of(config, &host)?;
    let repositories = registry.repositories().await.with_context(|| format!("{host}: its repositories cannot be listed"))?;
    let mut images = vec![];
    for repository in repositories.iter().filter(|repository| scope.as_ref().is_none_or(|scope| scope.contains(repository))) {
        images.extend(tags(&registry, repository).await?);
    }
    Ok(images)
}

async fn tags(registry: &Registry, repository: &Repository) -> anyhow::Result<Vec<Reference>> {
    let tags = registry.tags(repository).await.with_context(|| format!("{repository}: its tags cannot be listed"))?;
    let images = tags.iter().filter(|tag| !tag.is_attachment());
    Ok(images.map(|tag| Reference::tagged(registry.name(), repository, tag)).collect())
}

fn render(answer: &Answer) -> String {
    let reference = &answer.reference;
    let Some(result) = &answer.result else {
        return match answer.rules.as_slice() {
            [] => format!("{reference}: no rule signs it"),
            rules => format!("{reference}: would be signed by {}", rules.join(", ")),
        };
    };
    let mut text = format!("{reference}: {}", result.outcome.replace('_', " "));
    for part in [&result.reason, &result.error].into_iter().flatten() {
        text.push_str(&format!(", {part}"));
    }
    for signature in &result.signatures {
        text.push_str(&format!(
            "\n  {}: {} signature of {} as {}",
            signature.state, signature.format, signature.witness, signature.reference
        ));
    }
    text
}
