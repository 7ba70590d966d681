//! `countersign explain`: the whole story of an image.

use std::process::ExitCode;

use serde::Serialize;

use super::{
    Client, Output, output,
    verify::{parse_image, render_signatures},
};
use crate::{
    admin::{DeadLetterView, DeadPage, DeadQuery, QueueStatus, Story, StoryRequest},
    app,
    clock::Clock,
    config::Config,
    oci::Reference,
    outcome::{Outcome, Skip},
    rule::{Matches, Occasion, Rule, Trigger},
    signature::Format,
    verify::{Depth, Examination, Known, examine},
};

#[derive(Debug, Serialize)]
struct Explanation {
    reference: Reference,
    rules: Vec<RuleLine>,
    #[serde(skip_serializing_if = "Option::is_none")]
    examination: Option<Examination>,
    /// Why the registry could not be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    registry_error: Option<String>,
    /// Witnesses whose signatures could not be told, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unknown_witnesses: Vec<String>,
    story: Story,
    dead_letters: Vec<DeadLetterView>,
    queued_in_all: u64,
}

#[derive(Debug, Serialize)]
struct RuleLine {
    rule: String,
    witness: String,
    signs: bool,
    formats: Vec<Format>,
    reason: Option<&'static str>,
}

pub async fn run(config: &Config, client: &Client, clock: &Clock, reference: &str, output: Output) -> anyhow::Result<ExitCode> {
    let reference = parse_image(reference)?;
    let rules = app::rules(config)?;
    let Matches { matched, skipped } = rules.matching(&Occasion {
        registry: &reference.registry,
        repository: &reference.repository,
        tag: reference.tag.as_ref(),
        pushed_at: clock.now(),
        trigger: Trigger::Automatic,
    });
    let line = |rule: &Rule, skip: Option<Skip>| RuleLine {
        rule: rule.name.clone(),
        witness: rule.witness.clone(),
        signs: skip.is_none(),
        formats: rule.formats.clone(),
        reason: skip.map(Skip::reason),
    };
    let signing = matched.iter().map(|rule| line(rule, None));
    let rules = signing.chain(skipped.iter().map(|(rule, skip)| line(rule, Some(*skip)))).collect();

    let (mut examination, mut registry_error, mut unknown_witnesses) = (None, None, vec![]);
    match app::registry_of(config, &reference.registry) {
        Ok(registry) => {
            let mut known = vec![];
            for witness in &config.witnesses {
                match app::known(config, witness) {
                    Ok(theirs) => known.push(app::with_certificates(config, witness, theirs, clock).await),
                    Err(error) => unknown_witnesses.push(format!("{error:#}")),
                }
            }
            let trusts: Vec<_> = known.iter().map(Known::trust).collect();
            match examine(&registry, &reference, &trusts, clock.now(), Depth::Statements).await {
                Ok(found) => examination = Some(found),
                Err(error) => registry_error = Some(format!("{:#}", anyhow::Error::from(error))),
            }
        }
        Err(error) => registry_error = Some(format!("{error:#}")),
    }
    let digest = examination.as_ref().and_then(|examination| examination.digest.clone()).or_else(|| reference.digest.clone());
    let request = StoryRequest {
        registry: reference.registry.clone(),
        repository: reference.repository.clone(),
        tag: reference.tag.clone(),
        digest,
    };
    let story: Story = client.get("/api/v1/story", &request).await?;
    let status: QueueStatus = client.get("/api/v1/queue", &()).await?;
    let explanation = Explanation {
        dead_letters: dead_letters(client, &reference).await?,
        reference,
        rules,
        examination,
        registry_error,
        unknown_witnesses,
        story,
        queued_in_all: status.queued,
    };
    output::print(output, &explanation, render);
    // All that is known has been told, and it is not all.
    Ok(if explanation.registry_error.is_some() { ExitCode::from(3) } else { ExitCode::SUCCESS })
}

async fn dead_letters(client: &Client, reference: &Reference) -> anyhow::Result<Vec<DeadLetterView>> {
    let mut found = vec![];
    let mut query = DeadQuery::default();
    loop {
        let DeadPage { letters, next } = client.get("/api/v1/queue/dead", &query).await?;
        let Some(next) = next else { return Ok(found) };
        query.after = Some(next);
        found.extend(letters.into_iter().filter(|letter| {
            letter.image.as_ref().is_some_and(|image| {
                image.registry == reference.registry
                    && image.repository == reference.repository
                    && (reference.tag.is_none() || image.tag == reference.tag)
                    && reference.digest.as_ref().is_none_or(|digest| *digest == image.digest)
            })
        }));
    }
}

fn render(explanation: &Explanation) -> String {
    let mut text = format!("{}\n\nrules", explanation.reference);
    if explanation.rules.is_empty() {
        text.push_str("\n  no rule's scope holds this repository: nothing signs it");
    }
    for rule in &explanation.rules {
        match rule.reason {
            None => {
                let formats: Vec<_> = rule.formats.iter().map(|format| format.name()).collect();
                text.push_str(&format!(
                    "\n  {} signs it, with witness {}, as {}",
                    rule.rule,
                    rule.witness,
                    formats.join(" and ")
                ));
            }
            Some(reason) => text.push_str(&format!("\n  {} does not: {reason}", rule.rule)),
        }
    }
    text.push_str("\n\nregistry");
    match (&explanation.examination, &explanation.registry_error) {
        (_, Some(error)) => text.push_str(&format!("\n  could not be asked: {error}")),
        (Some(examination), None) => {
            match &examination.digest {
                Some(digest) => text.push_str(&format!("\n  digest {digest}")),
                None => text.push_str("\n  has no such image"),
            }
            text.push_str(&render_signatures(examination));
        }
        (None, None) => {}
    }
    for error in &explanation.unknown_witnesses {
        text.push_str(&format!("\n  signatures of a witness cannot be told: {error}"));
    }
    text.push_str("\n\nevents, newest first");
    for event in &explanation.story.queued {
        text.push_str(&format!("\n  {} by {}: queued, not tried yet", event.accepted_at, event.image.source));
    }
    if explanation.story.events.is_empty() && explanation.story.queued.is_empty() {
        text.push_str(&format!("\n  none is on record ({} are queued in all)", explanation.queued_in_all));
    }
    for record in &explanation.story.events {
        let source = record.event.source.as_deref().unwrap_or("unknown");
        text.push_str(&format!("\n  {} by {source}: {}", record.concluded_at, record.outcome.name().replace('_', " ")));
        if let Outcome::Skipped(skip) = &record.outcome {
            text.push_str(&format!(", {skip}"));
        }
        if let Some(detail) = &record.detail {
            text.push_str(&format!(", try {}: {detail}", record.attempt));
        }
    }
    for letter in &explanation.dead_letters {
        text.push_str(&format!("\n  dead letter {} ({}): {}", letter.id, letter.kind, letter.reason));
    }
    text
}
