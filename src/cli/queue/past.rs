//! `countersign queue replay --since`: accepted events of the past, run again.

use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use serde::Serialize;

use super::{
    NOT_ALL, ReplayArgs,
    pace::{Pace, Stop},
    select::time,
};
use crate::{
    admin::{PastPage, PastQuery, PastView, QueueStatus},
    cli::{Client, Output, Usage, output},
    clock::Clock,
};

#[derive(Debug, Serialize)]
struct Replayed {
    dry_run: bool,
    /// Queued again; or in a dry run, those that would be.
    events: u64,
    from: Timestamp,
    until: Timestamp,
    /// When the oldest event that is kept was accepted.
    oldest_kept: Option<Timestamp>,
    /// Where it was stopped; go on from there.
    #[serde(skip_serializing_if = "Option::is_none")]
    stopped_at: Option<Timestamp>,
}

pub(super) async fn replay(
    client: &Client,
    clock: &Clock,
    args: &ReplayArgs,
    since: &str,
    output: Output,
) -> anyhow::Result<ExitCode> {
    let now = clock.now();
    let from = time("--since", since)?;
    let until = args.until.as_deref().map_or(Ok(now), |until| time("--until", until))?;
    if until <= from {
        let what = if args.until.is_some() { "--until is not after --since" } else { "--since is in the future" };
        return Err(Usage(what.to_owned()).into());
    }
    let mut pace = Pace::new(args.how.rate.as_deref())?;
    let mut query = PastQuery { from, until, after: None, limit: None, most: None, filter: args.selection.filter(clock)? };
    let status: QueueStatus = client.get("/api/v1/queue", &()).await?;
    let Some(history) = status.history else {
        return Err(Usage("nothing is kept of the past: set `history` in [queue], and it is from then on".to_owned()).into());
    };
    let mut replayed =
        Replayed { dry_run: args.how.dry_run, events: 0, from, until, oldest_kept: history.oldest, stopped_at: None };
    let mut stop = Stop::on_interrupt();
    let bar = bar(history.oldest.map_or(until, |oldest| oldest.max(from)), until.min(now));
    let mut reached = from;
    let mut list = args.how.dry_run.then(|| output::List::begin(output));
    loop {
        if !pace.wait(&mut stop).await {
            replayed.stopped_at = Some(reached);
            break;
        }
        let answer: anyhow::Result<PastPage> = if args.how.dry_run {
            client.get("/api/v1/queue/past", &query).await
        } else {
            // Some that the filter does not hold of may lie between; when it is slow, it need not look far ahead either.
            query.most = Some(pace.batch());
            query.limit = Some((4 * pace.batch()).max(64));
            client.post("/api/v1/queue/past/replay", &query).await
        };
        let looked = answer.map_err(|error| match replayed.events {
            0 => error,
            _ => error.context(format!("{}, then it failed; go on with {}", told(&replayed), go_on(args, reached, until))),
        })?;
        replayed.events += looked.events.len() as u64;
        if !args.how.dry_run {
            pace.went(looked.events.len());
        }
        if let Some(list) = &mut list
            && !looked.events.iter().all(|event| list.item(event, render))
        {
            return Ok(ExitCode::SUCCESS);
        }
        reached = looked.reached.unwrap_or(reached);
        bar.seek(reached, replayed.events);
        if looked.next.is_none() {
            break;
        }
        query.after = looked.next;
    }
    bar.0.finish_and_clear();
    match (list, output) {
        // Programs get the list of them.
        (Some(list), Output::Json) => list.end(""),
        _ => output::print(output, &replayed, |replayed| {
            let mut text = told(replayed);
            if let Some(stopped_at) = replayed.stopped_at {
                text.push_str(&format!("\nstopped: go on with {}", go_on(args, stopped_at, until)));
            }
            if let Some(oldest) = replayed.oldest_kept.filter(|oldest| *oldest > from) {
                text.push_str(&format!("\nwhat is kept begins at {oldest}"));
            }
            text
        }),
    }
    Ok(if replayed.stopped_at.is_none() { ExitCode::SUCCESS } else { ExitCode::from(NOT_ALL) })
}

fn told(replayed: &Replayed) -> String {
    if replayed.dry_run {
        format!("would replay {} events", replayed.events)
    } else {
        format!("replayed {} events: they are queued again", replayed.events)
    }
}

/// What was accepted at that very moment may come twice, which costs two requests each.
fn go_on(args: &ReplayArgs, from: Timestamp, until: Timestamp) -> String {
    let mut command = format!("`countersign queue replay --since {from} --until {until}");
    let how = [("rule", &args.selection.rule), ("repository", &args.selection.repository), ("rate", &args.how.rate)];
    for (flag, value) in how {
        if let Some(value) = value {
            command.push_str(&format!(" --{flag} '{value}'"));
        }
    }
    command + "`"
}

fn render(event: &PastView) -> String {
    format!("{}  {:.0}  {}", event.id, event.accepted_at, event.image)
}

/// By time: how many there are in it is not known.
struct Bar(ProgressBar, Timestamp);

fn bar(from: Timestamp, until: Timestamp) -> Bar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {percent}% {eta}").expect("the template is constant");
    let length = u64::try_from(until.duration_since(from).as_millis()).unwrap_or_default();
    Bar(ProgressBar::new(length).with_style(style).with_message("replay"), from)
}

impl Bar {
    fn seek(&self, reached: Timestamp, events: u64) {
        self.0.set_position(u64::try_from(reached.duration_since(self.1).as_millis()).unwrap_or_default());
        self.0.set_message(format!("replay: {events}"));
    }
}
