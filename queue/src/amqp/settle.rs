//! What becomes of a message that was handed out.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::sync::oneshot;

use super::{
    Core,
    envelope::Envelope,
    flags,
    inbox::Held,
    lock,
    session::{Session, lost},
};
use crate::{Burial, Error, Retry, Settle};

/// Decisions that are remembered over the loss of a connection, at most.
const REMEMBERED: usize = 10_000;
/// When the broker takes no messages: how long until it is asked again.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub(super) enum Settlement {
    Ack,
    Retry(Retry),
    Bury(Burial),
}

/// What the supervisor does for others.
#[derive(Debug)]
pub(super) enum Chore {
    /// Somebody may want to know; nobody if it is told from before.
    Settle(Held, Settlement, Option<oneshot::Sender<Result<(), Error>>>),
    /// As [`Chore::Settle`], of a message that was in nobody's hands.
    Carry(Held, Settlement),
    /// It came out of a delay queue, and has to go into the next.
    Wait(Held),
    /// Behind the others of its partition, because its key is busy.
    Move(Held),
    /// Into the partition that its key has now.
    Reroute(Held),
    /// Let the broker have it back.
    Return(Held),
    /// Consume no more.
    Close(oneshot::Sender<()>),
}

/// Where a message is to get to that is in nobody's hands.
enum Goal {
    Settled(Settlement),
    /// As this, after a wait.
    Copied(Envelope, Duration),
}

/// Settles one message that was handed out.
pub(super) struct Hand {
    core: Arc<Core>,
    held: Held,
}

impl Hand {
    pub fn new(core: Arc<Core>, held: Held) -> Self {
        Self { core, held }
    }

    async fn settle(self, settlement: Settlement) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        // Done by the supervisor, whatever becomes of the caller.
        if self.core.chores.send(Chore::Settle(self.held, settlement, Some(reply))).is_err() {
            return Err(Error::Died);
        }
        answer.await.unwrap_or(Err(Error::Died))
    }
}

#[async_trait]
impl Settle for Hand {
    async fn ack(self: Box<Self>) -> Result<(), Error> {
        self.settle(Settlement::Ack).await
    }

    async fn retry(self: Box<Self>, retry: Retry) -> Result<(), Error> {
        self.settle(Settlement::Retry(retry)).await
    }

    async fn bury(self: Box<Self>, burial: Burial) -> Result<(), Error> {
        self.settle(Settlement::Bury(burial)).await
    }

    fn release(self: Box<Self>) {
        let Self { core, held } = *self;
        let session = core.session().ok().map(|session| session.number);
        if let Some(held) = core.inbox.give_back(held, session) {
            // Without a supervisor there is no connection, and the broker has it back already.
            let _ = core.chores.send(Chore::Return(held));
        }
    }
}

impl Core {
    /// Settles what was in hand, and lets the next of its key come.
    pub(super) async fn settle(
        &self,
        mut held: Held,
        mut settlement: Settlement,
        mut reply: Option<oneshot::Sender<Result<(), Error>>>,
    ) {
        let mut tell = |result| {
            if let Some(reply) = reply.take() {
                // They may have gone away.
                let _ = reply.send(result);
            }
        };
        loop {
            let session = self.session().ok().filter(|session| session.number == held.session);
            let Some(session) = session else {
                self.remember(&held, settlement);
                self.inbox.settled(&held);
                return tell(Err(lost()));
            };
            match self.carry(&session, &mut held, &mut settlement).await {
                Ok(()) => {
                    self.inbox.settled(&held);
                    return tell(Ok(()));
                }
                Err(error) => tell(Err(error)),
            }
            tokio::select! {
                () = tokio::time::sleep(PAUSE) => {}
                () = session.failed() => {}
            }
        }
    }

    /// Once its copy is confirmed, what is left of a settlement is the ack.
    pub(super) async fn carry(&self, session: &Session, held: &mut Held, settlement: &mut Settlement) -> Result<(), Error> {
        match settlement {
            Settlement::Ack => {}
            Settlement::Retry(retry) => {
                let mut envelope = Envelope { moved: 0, reason: Some(retry.reason.clone()), ..held.envelope.clone() };
                if retry.counted {
                    envelope.attempts = envelope.attempts.saturating_add(1);
                    envelope.waited = envelope.waited.saturating_add(retry.after);
                }
                self.put_off(session, envelope, retry.after).await?;
            }
            Settlement::Bury(burial) => {
                let properties = held.envelope.buried(burial, self.now(), &self.options.replica);
                session.publish("", &self.topology.dead(), properties, &held.envelope.message.body).await?;
            }
        }
        *settlement = Settlement::Ack;
        self.ack(session, held).await
    }

    /// Puts a copy where it waits, or in line again if it has nothing to wait for.
    pub(super) async fn put_off(&self, session: &Session, mut envelope: Envelope, after: Duration) -> Result<(), Error> {
        let route = self.topology.layout().route(&envelope.message.key);
        let (exchange, wait) = if after.is_zero() {
            envelope.left = 0;
            (self.topology.again(), None)
        } else {
            let (queue, here, left) = self.topology.delay(after);
            envelope.left = left;
            (queue, Some(here))
        };
        let mut properties = envelope.properties();
        if let Some(wait) = wait {
            properties = properties.with_expiration(wait.to_string().into());
        }
        session.publish(&exchange, &route, properties, &envelope.message.body).await?;
        if let Some(wait) = wait {
            self.note_waiting(&envelope, wait);
        }
        Ok(())
    }

    pub(super) async fn ack(&self, session: &Session, held: &Held) -> Result<(), Error> {
        if held.session != session.number {
            return Err(lost());
        }
        let acked = session.asked(held.acker.ack(flags::ACK)).await?;
        if acked { Ok(()) } else { Err(lost()) }
    }

    /// Does what nobody waits for. Without a connection there is nothing to do: the broker has the message.
    pub(super) async fn chore(&self, chore: Chore) {
        let done = match chore {
            Chore::Carry(held, settlement) => self.go_on(held, Goal::Settled(settlement)).await,
            Chore::Wait(held) => {
                let left = Duration::from_millis(held.envelope.left);
                let copy = held.envelope.clone();
                self.go_on(held, Goal::Copied(copy, left)).await
            }
            Chore::Move(held) => {
                // Each time longer, so that one busy key does not keep the broker busy.
                let wait = Duration::from_secs(1 << held.envelope.moved.min(6));
                let copy = held.envelope.moved_once_more();
                self.go_on(held, Goal::Copied(copy, wait)).await
            }
            Chore::Reroute(held) => {
                // At once, unless it goes to and fro.
                let moved = held.envelope.moved;
                let wait = if moved == 0 { Duration::ZERO } else { Duration::from_secs(1 << moved.min(6)) };
                let copy = held.envelope.moved_once_more();
                self.go_on(held, Goal::Copied(copy, wait)).await
            }
            Chore::Return(held) => match self.session() {
                Ok(session) => self.give_to_broker(&session, &held).await,
                Err(_) => return,
            },
            Chore::Settle(..) | Chore::Close(_) => return,
        };
        if let Err(error) = done {
            tracing::debug!(error = &error as &dyn std::error::Error, "a message stays with the broker as it is");
        }
    }

    /// Does what [`super::layouts::Moves`] was told of.
    async fn go_on(&self, mut held: Held, mut goal: Goal) -> Result<(), Error> {
        let Ok(session) = self.session() else {
            self.moves.end();
            return Err(lost());
        };
        let done = {
            let _pass = self.moves.pass().await;
            let done = match &mut goal {
                Goal::Settled(settlement) => self.carry(&session, &mut held, settlement).await,
                Goal::Copied(copy, wait) => self.copy_then_ack(&session, &held, copy.clone(), *wait).await,
            };
            if done.is_ok() {
                self.moves.end();
                return Ok(());
            }
            done
        };
        if let Goal::Settled(settlement) = goal {
            self.remember(&held, settlement);
        }
        let done = self.or_return(&session, &held, done).await;
        self.moves.end();
        done
    }

    async fn copy_then_ack(&self, session: &Session, held: &Held, envelope: Envelope, wait: Duration) -> Result<(), Error> {
        self.put_off(session, envelope, wait).await?;
        self.ack(session, held).await
    }

    /// What could not be done now comes again.
    async fn or_return(&self, session: &Session, held: &Held, done: Result<(), Error>) -> Result<(), Error> {
        if done.is_err() && !session.is_over() {
            tokio::time::sleep(PAUSE).await;
            self.give_to_broker(session, held).await?;
        }
        done
    }

    async fn give_to_broker(&self, session: &Session, held: &Held) -> Result<(), Error> {
        if held.session != session.number {
            return Ok(());
        }
        session.asked(held.acker.nack(flags::GIVE_BACK)).await.map(drop)
    }

    fn remember(&self, held: &Held, settlement: Settlement) {
        let mut unwritten = lock(&self.unwritten);
        // Beyond that, messages are handled twice, which they can be.
        if unwritten.len() < REMEMBERED {
            unwritten.insert(held.envelope.this_copy(), settlement);
        }
    }

    /// What was decided of a message that comes again.
    pub(super) fn remembered(&self, held: &Held) -> Option<Settlement> {
        if !held.redelivered {
            return None;
        }
        // Others of the same id are a retry or a replay, which nothing was decided of.
        lock(&self.unwritten).remove(&held.envelope.this_copy())
    }
}
