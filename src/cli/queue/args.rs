//! What is typed behind `countersign queue`.

use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub enum QueueCommand {
    /// How many events came in, where each stands, and how far back `replay --since` can go.
    Status,
    /// List the dead letters: events that ran out of attempts or can never succeed. Oldest first.
    Dead(DeadArgs),
    /// Put dead letters back into the queue, or with --since run accepted events of the past again.
    ///
    /// Dead letters go back with their patience renewed. Name them by id, by filters (all must hold) or by --all.
    ///
    /// With --since every event that was accepted then is queued again, whatever became of it: skipped by a rule that was
    /// wrong, signed with a key that was wrong, or all well. Each is handled by the rules in force now, as a push of its own
    /// time: rules do not sign what was pushed before they were `created`, a tag that names another image by now is
    /// superseded, and a signature that is there already costs two requests. How far back it goes is `[queue] history`.
    /// Dead letters of that time stay dead letters; replay or discard those by themselves.
    ///
    /// Ctrl-C stops between two events and says how to go on. Exit code 1: some of the named ids are no dead letters, or it
    /// was stopped.
    Replay(ReplayArgs),
    /// Drop dead letters for good. The events stay in what --since can run again.
    Discard(DiscardArgs),
}

/// Which dead letters. Filters are combined: all must hold.
#[derive(Debug, Clone, Default, Args)]
pub struct Selection {
    /// These dead letters.
    #[arg(value_name = "ID")]
    pub ids: Vec<String>,
    /// Only those for which this rule failed, and those that it would sign now.
    ///
    /// The first are the dead letters with which the ledger has a failure of this rule; the second follow from the
    /// configuration in force (the daemon's, if one runs): scope, tags, and that the image was pushed after the rule was
    /// `created`. With --since, only the second.
    #[arg(long, value_name = "NAME")]
    pub rule: Option<String>,
    /// Only those of repositories that this glob matches: `team-*/**`.
    #[arg(long, value_name = "GLOB")]
    pub repository: Option<String>,
    /// Only those of this kind: refused, `gave_up` or poison.
    #[arg(long, value_name = "KIND")]
    pub kind: Option<String>,
    /// Only those whose reason holds this text.
    #[arg(long, value_name = "TEXT")]
    pub error: Option<String>,
    /// Only those that were buried at least this long ago: 30m, 24h.
    #[arg(long, value_name = "AGE")]
    pub older_than: Option<String>,
    /// Only those that were buried at most this long ago: 30m, 24h.
    #[arg(long, value_name = "AGE")]
    pub newer_than: Option<String>,
}

#[derive(Debug, Clone, Default, Args)]
pub struct DeadArgs {
    #[command(flatten)]
    pub selection: Selection,
    /// At most so many.
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
}

/// How what is selected is gone through.
#[derive(Debug, Clone, Default, Args)]
pub struct Move {
    /// Only say which.
    #[arg(long)]
    pub dry_run: bool,
    /// At most so many a second; or a minute or an hour: 50, 600/m, 1000/h. As fast as it goes, if absent.
    #[arg(long, value_name = "RATE")]
    pub rate: Option<String>,
}

#[derive(Debug, Clone, Default, Args)]
pub struct DiscardArgs {
    #[command(flatten)]
    pub selection: Selection,
    /// All dead letters.
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub how: Move,
}

#[derive(Debug, Clone, Default, Args)]
pub struct ReplayArgs {
    #[command(flatten)]
    pub selection: Selection,
    /// All dead letters.
    #[arg(long, conflicts_with = "since")]
    pub all: bool,
    /// Instead of dead letters, the events that were accepted then or later: 2026-11-20T00:00Z, or a date in UTC.
    #[arg(
        long,
        value_name = "TIME",
        conflicts_with_all = ["ids", "kind", "error", "older_than", "newer_than"]
    )]
    pub since: Option<String>,
    /// With --since: only those that were accepted before; now, if absent.
    #[arg(long, value_name = "TIME", requires = "since")]
    pub until: Option<String>,
    #[command(flatten)]
    pub how: Move,
}
