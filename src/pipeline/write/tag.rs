//! Adding to what stands under a tag that others write too: look, add, write, look whether it held.

use bytes::Bytes;
use tokio::time::Duration;
use tracing::debug;

use crate::{
    oci::{Digest, Repository, Tag},
    pipeline::Error,
    registry::{self, Address, Registry},
};

/// Writes that did not hold, before the event goes back to the queue.
const ROUNDS: u32 = 8;

/// What is to be added to the content of a tag.
pub(crate) trait Addition {
    /// What stands under the tag.
    type Content;
    /// Of what is written.
    const MEDIA_TYPE: &'static str;

    /// Uploads everything that the content will refer to, unless it is there.
    async fn upload(&self) -> Result<(), Error>;

    /// What is there now, and its digest.
    async fn look(&self) -> Result<Option<(Digest, Self::Content)>, Error>;

    /// What is to be written instead of it. Whatever is there of others' is kept.
    async fn merge(&mut self, current: Option<Self::Content>) -> Result<Merged, Error>;

    /// What was merged last has been written.
    fn written(&mut self);

    /// Whether all that is to be added is there.
    fn is_in(&self, content: &Self::Content) -> bool;
}

pub(crate) enum Merged {
    /// Nothing is to be added any more.
    Complete,
    /// This took a while: look again, so that the look and the write stay close together.
    LookAgain,
    Write(Bytes),
}

/// Makes the addition, until a look afterwards finds it there.
pub(crate) async fn add<A: Addition>(
    registry: &Registry,
    repository: &Repository,
    tag: &Tag,
    addition: &mut A,
) -> Result<(), Error> {
    let address = Address::Tag(tag.clone());
    for round in 0..ROUNDS {
        let is_last = round + 1 == ROUNDS;
        addition.upload().await?;
        let current = addition.look().await?.map(|(_, content)| content);
        let content = match addition.merge(current).await? {
            Merged::Complete => return Ok(()),
            Merged::LookAgain => continue,
            Merged::Write(content) => content,
        };
        let digest = Digest::of(&content);
        match registry.put_manifest(repository, &address, A::MEDIA_TYPE, content).await {
            Ok(()) => addition.written(),
            // Another upload of the same blob was under way; the registry knows it by the next round.
            Err(error @ registry::Error::BlobUnknown { .. }) if !is_last => {
                debug!(error = &error as &dyn std::error::Error, round, "manifest refused for a blob, uploading again");
                pause(round).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        match addition.look().await? {
            Some((stored, _)) if stored == digest => return Ok(()),
            Some((_, content)) if addition.is_in(&content) => return Ok(()),
            _ => debug!(round, %tag, "another writer replaced what we added, adding it again"),
        }
        pause(round).await;
    }
    Err(Error::Overwritten { tag: tag.to_string(), rounds: ROUNDS })
}

/// Grows with the round, and differs between writers, so that they do not meet again.
pub(crate) async fn pause(round: u32) {
    let longest = 20u64 << round.min(6);
    tokio::time::sleep(Duration::from_millis(fastrand::u64(longest / 2..=longest))).await;
}
