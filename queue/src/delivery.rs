use std::{fmt, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::{Burial, Error, Message, Retry};

/// What a backend does when a delivery is settled. Each is called at most once, and one of them always.
#[async_trait]
pub trait Settle: Send {
    async fn ack(self: Box<Self>) -> Result<(), Error>;
    async fn retry(self: Box<Self>, retry: Retry) -> Result<(), Error>;
    async fn bury(self: Box<Self>, burial: Burial) -> Result<(), Error>;
    /// Dropped unsettled (a panic, an abort): gives the message back at once. Must not block.
    fn release(self: Box<Self>);
}

/// One message in somebody's hands. Settling takes it; one that is dropped goes back to the queue.
pub struct Delivery {
    message: Message,
    pushed_at: Timestamp,
    attempts: u32,
    waited: Duration,
    lost: CancellationToken,
    settle: Option<Box<dyn Settle>>,
}

impl Delivery {
    /// For backends. `attempts` and `waited` are those of earlier, counted retries.
    #[must_use]
    pub fn new(message: Message, pushed_at: Timestamp, attempts: u32, waited: Duration, settle: Box<dyn Settle>) -> Self {
        Self { message, pushed_at, attempts, waited, lost: CancellationToken::new(), settle: Some(settle) }
    }

    /// Ours only until this is cancelled.
    #[must_use]
    pub fn until(mut self, lost: CancellationToken) -> Self {
        self.lost = lost;
        self
    }

    #[must_use]
    pub fn message(&self) -> &Message {
        &self.message
    }

    /// When the message was pushed.
    #[must_use]
    pub fn pushed_at(&self) -> Timestamp {
        self.pushed_at
    }

    /// Counted retries before this delivery; 0 the first time, and after a replay.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The sum of the waits of counted retries.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Cancelled when others may have this message, or one of an equal key: whatever must not be done twice at once is to be
    /// left alone then. It can still be settled as ever.
    #[must_use]
    pub fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    /// Handled: the message is gone, and stays so if this process is killed.
    ///
    /// Of all three ways to settle: with [`Error::Unavailable`] it is not on record yet. The queue remembers it and writes it as
    /// soon as it can; only if the process ends before that is the message delivered again. The same holds for a call that is
    /// cancelled, and after a power loss for an ack or a retry that was the last to be written.
    pub async fn ack(mut self) -> Result<(), Error> {
        self.take().ack().await
    }

    /// Not now: deliver it again later.
    pub async fn retry(mut self, retry: Retry) -> Result<(), Error> {
        self.take().retry(retry).await
    }

    /// Never, until an administrator says so.
    pub async fn bury(mut self, burial: Burial) -> Result<(), Error> {
        self.take().bury(burial).await
    }

    fn take(&mut self) -> Box<dyn Settle> {
        self.settle.take().expect("settling consumes the delivery")
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if let Some(settle) = self.settle.take() {
            settle.release();
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery").field("id", &self.message.id).field("attempts", &self.attempts).finish_non_exhaustive()
    }
}
