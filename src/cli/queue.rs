//! `countersign queue`: the queue from outside.

use std::process::ExitCode;

use anyhow::{Context as _, bail};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use globset::{GlobBuilder, GlobMatcher};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::{Client, Output, QueueCommand, Selection, SelectionAction, output};
use crate::{
    admin::{DeadLetterView, Ids, Moved, Page, QueueStatus},
    clock::Clock,
    config::parse_duration,
};

/// Dead letters that are moved by one request.
const BATCH: usize = 200;

pub async fn run(client: &Client, clock: &Clock, command: &QueueCommand, output: Output) -> anyhow::Result<ExitCode> {
    match command {
        QueueCommand::Status => {
            let status: QueueStatus = client.get("/api/v1/queue", &()).await?;
            output::print(output, &status, render_status);
        }
        QueueCommand::Dead(selection) => {
            let letters = select(client, clock, selection).await?;
            output::print(output, &letters, |letters| render_letters(letters, clock));
        }
        QueueCommand::Replay(action) => act(client, clock, action, "replay", output).await?,
        QueueCommand::Discard(action) => act(client, clock, action, "discard", output).await?,
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Default, Serialize)]
struct Acted {
    dry_run: bool,
    done: u64,
    ids: Vec<String>,
    unknown: Vec<String>,
}

async fn act(client: &Client, clock: &Clock, action: &SelectionAction, verb: &str, output: Output) -> anyhow::Result<()> {
    let filtered = action.selection.is_filtered();
    if action.selection.ids.is_empty() && !action.all && !filtered {
        bail!(super::Usage(format!("say which: ids, a filter, or --all (`countersign queue {verb} --help`)")));
    }
    let letters = select(client, clock, &action.selection).await?;
    let mut acted = Acted { dry_run: action.dry_run, ..Acted::default() };
    acted.unknown = action.selection.ids.iter().filter(|id| !letters.iter().any(|letter| letter.id == **id)).cloned().collect();
    acted.ids = letters.into_iter().map(|letter| letter.id).collect();
    if !action.dry_run {
        let bar = progress(acted.ids.len() as u64, verb);
        for ids in acted.ids.chunks(BATCH) {
            let moved: Moved = client.post(&format!("/api/v1/queue/{verb}"), &Ids { ids: ids.to_vec() }).await?;
            acted.done += moved.done;
            acted.unknown.extend(moved.unknown);
            bar.inc(ids.len() as u64);
        }
        bar.finish_and_clear();
    }
    output::print(output, &acted, |acted| {
        let mut text = if acted.dry_run {
            format!("would {verb} {} dead letters:\n{}", acted.ids.len(), acted.ids.join("\n"))
        } else {
            format!("{verb}: {} dead letters", acted.done)
        };
        for id in &acted.unknown {
            text.push_str(&format!("\nno dead letter has id {id}"));
        }
        text
    });
    Ok(())
}

/// A bar on a terminal, and nothing where nobody looks.
pub fn progress(length: u64, what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}").expect("the template is constant");
    ProgressBar::new(length).with_style(style).with_message(what.to_owned())
}

impl Selection {
    fn is_filtered(&self) -> bool {
        self.repository.is_some() || self.kind.is_some() || self.error.is_some() || self.older_than.is_some()
    }
}

async fn select(client: &Client, clock: &Clock, selection: &Selection) -> anyhow::Result<Vec<DeadLetterView>> {
    let glob: Option<GlobMatcher> = selection
        .repository
        .as_deref()
        .map(|glob| GlobBuilder::new(glob).literal_separator(true).build().map(|glob| glob.compile_matcher()))
        .transpose()
        .map_err(|error| super::Usage(format!("--repository: {error}")))?;
    let age = selection
        .older_than
        .as_deref()
        .map(parse_duration)
        .transpose()
        .map_err(|error| super::Usage(format!("--older-than: {error}")))?;
    let before = age.map(|age| clock.now().checked_sub(age)).transpose().context("--older-than reaches before all time")?;
    let holds = |letter: &DeadLetterView| {
        (selection.ids.is_empty() || selection.ids.contains(&letter.id))
            && selection.kind.as_ref().is_none_or(|kind| *kind == letter.kind)
            && selection.error.as_ref().is_none_or(|text| letter.reason.contains(text))
            && before.is_none_or(|before| letter.buried_at <= before)
            && glob
                .as_ref()
                .is_none_or(|glob| letter.image.as_ref().is_some_and(|image| glob.is_match(image.repository.as_str())))
    };
    let mut letters = vec![];
    let mut page = Page::default();
    loop {
        let more: Vec<DeadLetterView> = client.get("/api/v1/queue/dead", &page).await?;
        let Some(last) = more.last() else { return Ok(letters) };
        page.after = Some(last.id.clone());
        letters.extend(more.into_iter().filter(&holds));
    }
}

fn render_status(status: &QueueStatus) -> String {
    let rows = [
        ("received", status.received),
        ("signed", status.signed),
        ("already signed", status.already_signed),
        ("skipped", status.skipped),
        ("dead", status.dead),
        ("queued", status.queued),
    ];
    let mut text = String::new();
    for (name, count) in rows {
        text.push_str(&format!("{name:16}{count:>10}\n"));
    }
    text.push_str(&format!(
        "\nof the queued, {} are ready, {} in flight, {} waiting to be tried again\n",
        status.ready, status.in_flight, status.waiting
    ));
    if let Some(seconds) = status.oldest_seconds {
        text.push_str(&format!("the oldest has been here for {seconds} s\n"));
    }
    if status.dead_letters > 0 {
        text.push_str(&format!("{} dead letters: see `countersign queue dead`\n", status.dead_letters));
    }
    text
}

fn render_letters(letters: &[DeadLetterView], clock: &Clock) -> String {
    if letters.is_empty() {
        return "no dead letters".to_owned();
    }
    let mut text = String::new();
    for letter in letters {
        let what = if let Some(image) = &letter.image {
            let tag = image.tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
            format!("{}/{}{tag}@{}", image.registry, image.repository, image.digest)
        } else {
            let bytes = letter.body.as_deref().map_or(0, |body| BASE64_STANDARD.decode(body).map_or(0, |body| body.len()));
            format!("{bytes} bytes that are no event (--output json shows them)")
        };
        let age = clock.now().duration_since(letter.buried_at).as_secs();
        text.push_str(&format!(
            "{}  {}  {age} s ago, after {} tries\n    {what}\n    {}\n",
            letter.id, letter.kind, letter.attempts, letter.reason
        ));
    }
    text
}
