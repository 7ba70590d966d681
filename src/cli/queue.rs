//! `countersign queue`: the queue from outside.

mod args;
mod dead;
mod pace;
mod past;
mod select;

use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};

use super::{Client, Output, output};
use crate::{
    admin::{PartitionView, QueueStatus},
    clock::Clock,
};

pub use args::{DeadArgs, DiscardArgs, Move, QueueCommand, ReplayArgs, Selection};

/// Exit code of what was stopped before its end, and of what was named and is not there.
const NOT_ALL: u8 = 1;

pub async fn run(client: &Client, clock: &Clock, command: &QueueCommand, output: Output) -> anyhow::Result<ExitCode> {
    match command {
        QueueCommand::Status => {
            let status: QueueStatus = client.get("/api/v1/queue", &()).await?;
            output::print(output, &status, render_status);
            Ok(ExitCode::SUCCESS)
        }
        QueueCommand::Dead(args) => dead::list(client, clock, args, output).await,
        QueueCommand::Replay(args) => match &args.since {
            Some(since) => past::replay(client, clock, args, since, output).await,
            None => dead::act(client, clock, (&args.selection, args.all, &args.how), "replay", output).await,
        },
        QueueCommand::Discard(args) => dead::act(client, clock, (&args.selection, args.all, &args.how), "discard", output).await,
    }
}

/// A bar on a terminal, and nothing where nobody looks.
pub fn progress(length: u64, what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}").expect("the template is constant");
    ProgressBar::new(length).with_style(style).with_message(what.to_owned())
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
        text.push_str(&format!("the oldest has been here for at least {seconds} s\n"));
    }
    if status.dead_letters > 0 {
        text.push_str(&format!("{} dead letters: see `countersign queue dead`\n", status.dead_letters));
    }
    match &status.history {
        None => text.push_str("nothing is kept of the past: see `history` in [queue]\n"),
        Some(history) => {
            if let Some(oldest) = history.oldest {
                text.push_str(&format!("`queue replay --since` reaches back to {oldest:.0}, {} events\n", history.events));
            }
        }
    }
    render_partitions(&mut text, &status.partitions);
    text
}

fn render_partitions(text: &mut String, partitions: &[PartitionView]) {
    if partitions.is_empty() {
        return;
    }
    text.push_str(&format!("\n{:10}{:>10}{:>12}{:>10}  held by\n", "partition", "ready", "in flight", "oldest"));
    for PartitionView { name, holder, ready, in_flight, oldest_seconds } in partitions {
        let oldest = oldest_seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds} s"));
        let holder = holder.as_deref().unwrap_or("-");
        text.push_str(&format!("{name:10}{ready:>10}{in_flight:>12}{oldest:>10}  {holder}\n"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_shown_with_their_holders_if_there_are_any() {
        let mut text = String::new();
        render_partitions(&mut text, &[]);
        assert_eq!(text, "");
        let empty = PartitionView { name: "8.0".to_owned(), holder: None, ready: 0, in_flight: 0, oldest_seconds: None };
        let held = PartitionView {
            name: "8.1".to_owned(),
            holder: Some("one-12".to_owned()),
            ready: 1200,
            in_flight: 3,
            oldest_seconds: Some(90),
        };
        render_partitions(&mut text, &[empty, held]);
        let lines = [
            "",
            "partition      ready   in flight    oldest  held by",
            "8.0                0           0         -  -",
            "8.1             1200           3      90 s  one-12",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), lines);
    }
}
