//! The writing: what waits is done in one transaction, then everybody is told.
//!
//! A transaction is three round trips, however many share it: what there is (and locks on it), what changes, and the commit.
//! All transactions lock events first, then signatures, then the tally, each in one order, so that replicas wait for each
//! other and do not deadlock; where they do all the same, the database picks one and it is done again.

mod named;
mod page;

use std::collections::HashSet;

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use self::page::Page;
pub(super) use self::page::text_column;
use super::{Failure, Link, failure::Meaning, link::Session};
use crate::{
    clock::Clock,
    ledger::{Error, MOST_PER_COMMIT, Work},
};

/// How often what met another transaction is done again.
const TRIES: u32 = 8;
/// Of the tally (`schema.rs`). Enough for replicas to meet rarely, and few rows to sum up.
const SHARDS: i32 = 64;

/// What is prepared on the connection that is written over.
pub(super) fn statements() -> [String; 10] {
    page::STATEMENTS.map(str::to_owned)
}

pub(super) struct Job {
    pub(super) work: Work,
    pub(super) reply: oneshot::Sender<Result<(), Error>>,
}

pub(super) struct Writer {
    link: Link<10>,
    clock: Clock,
}

/// How far a transaction came that failed.
enum Stage {
    /// Nothing of it is done.
    Before(Failure),
    /// It may be done.
    Commit(Failure),
}

impl Writer {
    pub(super) fn new(link: Link<10>, clock: Clock) -> Self {
        Self { link, clock }
    }

    /// Until the last [`super::Store`] is dropped.
    pub(super) async fn run(mut self, mut jobs: mpsc::UnboundedReceiver<Job>) {
        let mut next = None;
        while let Some(first) = match next.take() {
            Some(job) => Some(job),
            None => jobs.recv().await,
        } {
            let mut batch = Batch::of(first);
            while batch.jobs.len() < MOST_PER_COMMIT
                && let Ok(job) = jobs.try_recv()
            {
                if let Err(job) = batch.take(job) {
                    next = Some(job);
                    break;
                }
            }
            let works: Vec<_> = batch.jobs.iter().map(|job| &job.work).collect();
            let result = self.write(&works).await;
            for job in batch.jobs {
                // Whoever waited may have gone.
                let _ = job.reply.send(result.clone());
            }
        }
    }

    async fn write(&mut self, works: &[&Work]) -> Result<(), Error> {
        let mut tries = 0;
        loop {
            tries += 1;
            let patience = self.link.patience();
            let session = self.link.session("written").await?;
            let page = Page::new(works, self.clock.now(), fastrand::i32(0..SHARDS));
            let done = timeout(patience, commit(session, &page)).await.unwrap_or(Err(Stage::Commit(Failure::Silent)));
            let (failure, is_undone) = match done {
                Ok(()) => return Ok(()),
                Err(Stage::Before(failure)) => (failure, true),
                Err(Stage::Commit(failure)) => (failure, false),
            };
            // A connection that has been cut before the commit was sent says nothing about the database.
            let is_gone = failure.is_lost() && tries == 1;
            let again = is_undone && tries < TRIES && (is_gone || failure.meaning() == Meaning::Again);
            if !(again && !is_gone && session.client.batch_execute("ROLLBACK").await.is_ok()) {
                self.link.drop_session();
            }
            if !again {
                return Err(failure.into_error("written"));
            }
        }
    }
}

/// What shares a transaction. No two of it are about the same message: their order would matter.
struct Batch {
    jobs: Vec<Job>,
    messages: HashSet<String>,
}

impl Batch {
    fn of(first: Job) -> Self {
        let mut batch = Self { jobs: vec![], messages: HashSet::new() };
        // The first always fits.
        drop(batch.take(first));
        batch
    }

    fn take(&mut self, job: Job) -> Result<(), Job> {
        let messages: Vec<&str> = match &job.work {
            Work::Intend(intents) => intents.iter().map(|intent| intent.message_id.as_str()).collect(),
            Work::Conclude(conclusion) => vec![&conclusion.event.message_id],
            Work::Forget(message, _) => vec![message],
            Work::Check => vec![],
        };
        if messages.iter().any(|message| self.messages.contains(*message)) {
            return Err(job);
        }
        self.messages.extend(messages.into_iter().map(str::to_owned));
        self.jobs.push(job);
        Ok(())
    }
}

async fn commit(session: &Session<10>, page: &Page<'_>) -> Result<(), Stage> {
    page.write(session).await.map_err(Stage::Before)?;
    session.client.batch_execute("COMMIT").await.map_err(|error| Stage::Commit(error.into()))
}
