//! Dead letters: listed as they come, put back or dropped in batches.

use std::{collections::HashSet, process::ExitCode};

use anyhow::bail;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Serialize;

use super::{
    DeadArgs, Move, NOT_ALL, Selection,
    pace::{Pace, Stop},
    progress,
};
use crate::{
    admin::{DeadLetterView, DeadPage, DeadQuery, Ids, Moved},
    cli::{Client, Output, Usage, output},
    clock::Clock,
};

/// Dead letters that one request looks at: some may carry megabytes.
const PAGE: usize = 500;

/// `countersign queue dead`: prints each page as it comes.
pub(super) async fn list(client: &Client, clock: &Clock, args: &DeadArgs, output: Output) -> anyhow::Result<ExitCode> {
    let mut letters = Letters::new(client, clock, &args.selection)?;
    let mut left = args.limit.unwrap_or(u64::MAX);
    let mut list = output::List::begin(output);
    while left > 0
        && let Some(page) = letters.next_page().await?
    {
        for letter in page.iter().take(usize::try_from(left).unwrap_or(usize::MAX)) {
            left -= 1;
            if !list.item(letter, |letter| render(letter, clock)) {
                // Whoever read it has seen enough.
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
    list.end("no dead letters");
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Default, Serialize)]
struct Acted {
    dry_run: bool,
    done: u64,
    ids: Vec<String>,
    unknown: Vec<String>,
    /// Not come to, because it was stopped.
    left: u64,
}

/// `countersign queue replay` and `discard` of dead letters. Only ids are held, whatever their number.
pub(super) async fn act(
    client: &Client,
    clock: &Clock,
    (selection, all, how): (&Selection, bool, &Move),
    verb: &str,
    output: Output,
) -> anyhow::Result<ExitCode> {
    if selection.ids.is_empty() && !all && !selection.is_filtered() {
        bail!(Usage(format!("say which: ids, a filter, or --all (`countersign queue {verb} --help`)")));
    }
    let mut pace = Pace::new(how.rate.as_deref())?;
    let mut acted = Acted { dry_run: how.dry_run, ..Acted::default() };
    if selection.ids.is_empty() || selection.is_filtered() || how.dry_run {
        let mut letters = Letters::new(client, clock, selection)?;
        let mut found = HashSet::new();
        while let Some(page) = letters.next_page().await? {
            for letter in page {
                // One that is replayed meanwhile by somebody else may make a page begin anew.
                if found.insert(letter.id.clone()) {
                    acted.ids.push(letter.id);
                }
            }
        }
        acted.unknown = selection.ids.iter().filter(|id| !found.contains(*id)).cloned().collect();
    } else {
        acted.ids.clone_from(&selection.ids);
    }
    let mut failure = None;
    if !how.dry_run {
        let mut stop = Stop::on_interrupt();
        let bar = progress(acted.ids.len() as u64, verb);
        let batches = acted.ids.chunks(pace.batch());
        let mut gone = 0;
        for ids in batches {
            if !pace.wait(&mut stop).await {
                break;
            }
            match client.post::<_, Moved>(&format!("/api/v1/queue/{verb}"), &Ids { ids: ids.to_vec() }).await {
                Ok(moved) => {
                    acted.done += moved.done;
                    acted.unknown.extend(moved.unknown);
                }
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
            gone += ids.len();
            pace.went(ids.len());
            bar.inc(ids.len() as u64);
        }
        bar.finish_and_clear();
        acted.left = (acted.ids.len() - gone) as u64;
    }
    if let Some(error) = failure {
        let done = format!(
            "{verb}: {} dead letters, then it failed; the same command goes on with the other {}",
            acted.done, acted.left
        );
        return Err(error.context(done));
    }
    output::print(output, &acted, |acted| render_acted(acted, verb));
    let all_there = selection.ids.is_empty() || acted.unknown.is_empty();
    Ok(if all_there && acted.left == 0 { ExitCode::SUCCESS } else { ExitCode::from(NOT_ALL) })
}

/// The selected ones, page by page.
struct Letters<'a> {
    client: &'a Client,
    ids: HashSet<&'a str>,
    query: DeadQuery,
}

impl<'a> Letters<'a> {
    fn new(client: &'a Client, clock: &Clock, selection: &'a Selection) -> anyhow::Result<Self> {
        let filter = selection.filter(clock)?;
        let ids = selection.ids.iter().map(String::as_str).collect();
        Ok(Self { client, ids, query: DeadQuery { after: None, limit: Some(PAGE), filter } })
    }

    /// Possibly empty; `None` at the end.
    async fn next_page(&mut self) -> anyhow::Result<Option<Vec<DeadLetterView>>> {
        let DeadPage { mut letters, next } = self.client.get("/api/v1/queue/dead", &self.query).await?;
        let Some(next) = next else { return Ok(None) };
        self.query.after = Some(next);
        letters.retain(|letter| self.ids.is_empty() || self.ids.contains(letter.id.as_str()));
        Ok(Some(letters))
    }
}

fn render(letter: &DeadLetterView, clock: &Clock) -> String {
    let what = if let Some(image) = &letter.image {
        image.to_string()
    } else {
        let bytes = letter.body.as_deref().map_or(0, |body| BASE64_STANDARD.decode(body).map_or(0, |body| body.len()));
        format!("{bytes} bytes that are no event (--output json shows them)")
    };
    let age = clock.now().duration_since(letter.buried_at).as_secs();
    let of = letter.replay_of.as_ref().map(|id| format!(", a replay of {id}")).unwrap_or_default();
    format!("{}  {}  {age} s ago, after {} tries{of}\n    {what}\n    {}", letter.id, letter.kind, letter.attempts, letter.reason)
}

fn render_acted(acted: &Acted, verb: &str) -> String {
    let mut text = if acted.dry_run {
        format!("would {verb} {} dead letters:\n{}", acted.ids.len(), acted.ids.join("\n"))
    } else {
        format!("{verb}: {} dead letters", acted.done)
    };
    if acted.left > 0 {
        text.push_str(&format!("\nstopped with {} to go: the same command goes on with them", acted.left));
    }
    for id in &acted.unknown {
        text.push_str(&format!("\nno dead letter has id {id}"));
    }
    text
}
