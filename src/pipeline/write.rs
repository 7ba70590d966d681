//! One digest's signatures: look, sign what is missing, add it to what is there, write, read back.
//!
//! They are kept in two places, each a [`Store`]: the `.sig` tag, and the image's referrers. Both are seen to at once, by the
//! same steps, and neither's failure is the other's.
//!
//! A registry has no conditional write, so two writers of one tag can overwrite each other. What can be done is done: writers
//! in this process take turns by digest, everything slow comes before the last look, and after the write another look tells
//! whether it held; if not, all is done again.

pub(crate) mod referrers;
pub(crate) mod signature_tag;
pub(crate) mod tag;

use std::{
    collections::{HashMap, HashSet},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock, Weak},
};

use futures::{
    StreamExt as _, future,
    stream::{self, FuturesUnordered},
};
use tokio::time::{Duration, Instant, timeout, timeout_at};

use crate::{
    clock::Clock,
    ledger::{Intent, Ledger},
    oci::Tag,
    pipeline::{
        Error,
        locate::TAGS_AT_ONCE,
        plan::{Target, Wanted},
    },
    registry::{self, Registry},
    signature::{Format, notation},
    verify::{self, Fresh},
};
use referrers::ReferrerStore;
use signature_tag::SignatureTag;

/// What was looked up longer ago than this is looked up again before it is relied on: what a tag names, and which referrers there are.
const LOOK_IS_FRESH: Duration = Duration::from_secs(2);

/// What is signed within this time of the first is written with it.
const NEXT_WRITE: Duration = Duration::from_secs(2);

/// A place in a registry where signatures of one digest are kept.
trait Store {
    /// Whether signatures of this format are kept here.
    fn keeps(format: Format) -> bool;

    /// Which of these are there: a valid signature of the same witness that says the same.
    async fn look(&mut self, wanted: &[Numbered<'_>]) -> Result<HashSet<usize>, Error>;

    /// Uploads what is needed and known before the signatures are.
    async fn prepare(&self, missing: &[Numbered<'_>]) -> Result<(), registry::Error>;

    /// Adds these, until a look afterwards finds them there. Returns which were added: an equal one may have come from elsewhere
    /// meanwhile.
    async fn write(&mut self, ready: &[Ready<'_>]) -> Result<HashSet<usize>, Error>;
}

/// Waits for the next signature, and takes with it those that come soon after.
async fn gather<T>(signing: &mut FuturesUnordered<impl Future<Output = T>>, signed: &mut Vec<T>) {
    if signed.is_empty() {
        signed.extend(signing.next().await);
    }
    let all = async {
        while let Some(one) = signing.next().await {
            signed.push(one);
        }
    };
    // A key that is slow keeps what another has signed, or itself before, waiting no longer.
    drop(timeout(NEXT_WRITE, all).await);
}

/// A wanted signature, and its place in the target's list.
type Numbered<'a> = (usize, &'a Wanted);

/// A wanted signature that has been made.
struct Ready<'a> {
    index: usize,
    wanted: &'a Wanted,
    fresh: Fresh,
}

/// What became of one wanted signature.
#[derive(Debug)]
pub enum Written {
    /// Made now, and read back.
    New,
    /// A valid one was there.
    Found,
    Failed(Error),
}

/// Turns by digest, for the writers of this process.
#[derive(Debug, Default)]
pub struct Turns(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Turns {
    async fn take(&self, key: String) -> tokio::sync::OwnedMutexGuard<()> {
        const TIDY_ABOVE: usize = 1024;
        let turn = {
            let mut turns = self.0.lock().expect("nothing panics while it holds the map");
            if turns.len() > TIDY_ABOVE {
                turns.retain(|_, turn| turn.strong_count() > 0);
            }
            let existing = turns.get(&key).and_then(Weak::upgrade);
            existing.unwrap_or_else(|| {
                let turn = Arc::default();
                turns.insert(key, Arc::downgrade(&turn));
                turn
            })
        };
        turn.lock_owned().await
    }
}

/// When each tag was last seen to name what is signed.
#[derive(Debug)]
pub struct FreshTags {
    /// All of them, once.
    all: Instant,
    since: Mutex<HashMap<Tag, Instant>>,
}

impl FreshTags {
    pub fn new(all: Instant) -> Self {
        Self { all, since: Mutex::default() }
    }

    fn is_fresh(&self, tag: &Tag) -> bool {
        self.since().get(tag).unwrap_or(&self.all).elapsed() <= LOOK_IS_FRESH
    }

    fn confirm(&self, tag: &Tag, asked: Instant) {
        self.since().insert(tag.clone(), asked);
    }

    fn since(&self) -> MutexGuard<'_, HashMap<Tag, Instant>> {
        self.since.lock().expect("nothing panics while it holds the map")
    }
}

/// What writing needs besides the target.
#[derive(Clone, Copy)]
pub struct Desk<'a> {
    pub registry: &'a Registry,
    pub ledger: &'a Ledger,
    pub turns: &'a Turns,
    pub clock: &'a Clock,
    pub tags: &'a FreshTags,
    /// What is not done by then has failed.
    pub deadline: Instant,
}

impl Desk<'_> {
    /// Sees to every signature of the target. One answer for each of `target.wanted`, in order.
    pub async fn see_to(&self, target: &Target) -> Vec<Written> {
        let answers: Vec<OnceLock<Written>> = target.wanted.iter().map(|_| OnceLock::new()).collect();
        {
            let mut work = pin!(async {
                let subject = &target.subject;
                let turn = format!("{}/{}@{}", subject.registry(), subject.repository(), subject.digest());
                let _turn = self.turns.take(turn).await;
                let tag = SignatureTag::new(self.registry, target);
                let referrers = ReferrerStore::new(self.registry, target, self.clock.now());
                tokio::join!(self.see_to_store(tag, target, &answers), self.see_to_store(referrers, target, &answers));
            });
            if timeout_at(self.deadline, work.as_mut()).await.is_err() {
                for (answer, wanted) in answers.iter().zip(&target.wanted) {
                    // Asked while this work itself still stands in the line, if there is one.
                    let throttled = wanted.witness.is_waited_for();
                    drop(answer.set(Written::Failed(Error::Deadline { throttled })));
                }
            }
        }
        let answer =
            |answer: OnceLock<Written>| answer.into_inner().expect("each is found, made, refused, or failed with its store");
        answers.into_iter().map(answer).collect()
    }

    async fn see_to_store<S: Store>(&self, mut store: S, target: &Target, answers: &[OnceLock<Written>]) {
        let wanted: Vec<Numbered<'_>> =
            target.wanted.iter().enumerate().filter(|(_, wanted)| S::keeps(wanted.prepared.format())).collect();
        if wanted.is_empty() {
            return;
        }
        if let Err(error) = self.try_see_to(&mut store, target, &wanted, answers).await {
            // What is open after a failure failed by it.
            fail_open(wanted.iter().map(|(index, _)| &answers[*index]), error);
        }
    }

    async fn try_see_to<S: Store>(
        &self,
        store: &mut S,
        target: &Target,
        wanted: &[Numbered<'_>],
        answers: &[OnceLock<Written>],
    ) -> Result<(), Error> {
        let answer = |index: usize, written: Written| drop(answers[index].set(written));
        let found = store.look(wanted).await?;
        for index in &found {
            answer(*index, Written::Found);
        }
        let missing: Vec<Numbered<'_>> = wanted.iter().copied().filter(|(index, _)| !found.contains(index)).collect();
        if missing.is_empty() {
            return Ok(());
        }

        let signing = missing.iter().map(|(index, wanted)| async move { (*index, *wanted, self.sign(target, wanted).await) });
        let mut signing: FuturesUnordered<_> = signing.collect();
        let mut signed = vec![];
        let (intended, ()) = tokio::join!(
            async {
                self.ledger.intend(missing.iter().map(|(_, wanted)| intent(target, wanted)).collect()).await?;
                gather(&mut signing, &mut signed).await;
                Ok::<_, Error>(())
            },
            async {
                // Failing here is found out below, where the blobs are needed.
                drop(store.prepare(&missing).await);
            }
        );
        intended?;
        while !signed.is_empty() {
            signed.sort_unstable_by_key(|(index, ..)| *index);
            let mut ready = vec![];
            for (index, wanted, result) in signed.drain(..) {
                match result {
                    Ok(fresh) => ready.push(Ready { index, wanted, fresh }),
                    Err(error) => answer(index, Written::Failed(error)),
                }
            }
            let write = async {
                let moved = self.moved_tags(target, &ready).await;
                ready.retain(|one| match tag_of(one.wanted).and_then(|tag| moved.get(tag)) {
                    Some(error) => {
                        answer(one.index, Written::Failed(Error::Shared(error.clone())));
                        false
                    }
                    None => true,
                });
                if ready.is_empty() {
                    return Ok(());
                }
                let ours = store.write(&ready).await?;
                for Ready { index, .. } in &ready {
                    answer(*index, if ours.contains(index) { Written::New } else { Written::Found });
                }
                Ok::<_, Error>(())
            };
            // The others go on meanwhile: what has its turn with a key is not to hold it.
            let mut write = pin!(write);
            loop {
                tokio::select! {
                    written = &mut write => break written?,
                    Some(one) = signing.next() => signed.push(one),
                }
            }
            gather(&mut signing, &mut signed).await;
        }
        Ok(())
    }

    /// The tags that these name and that have moved on since they were resolved a while ago, or cannot be resolved any more.
    async fn moved_tags(&self, target: &Target, ready: &[Ready<'_>]) -> HashMap<Tag, Arc<Error>> {
        let tags: HashSet<&Tag> = ready.iter().filter_map(|one| tag_of(one.wanted)).collect();
        let looks = tags.into_iter().filter(|tag| !self.tags.is_fresh(tag)).map(|tag| async move {
            let asked = Instant::now();
            let error = match self.registry.resolve(target.subject.repository(), tag).await {
                Ok(Some(now)) if now == target.root => {
                    self.tags.confirm(tag, asked);
                    return None;
                }
                Ok(_) => Error::TagMoved { tag: tag.clone() },
                Err(error) => error.into(),
            };
            Some((tag.clone(), Arc::new(error)))
        });
        let looks: Vec<_> = looks.collect();
        stream::iter(looks).buffer_unordered(TAGS_AT_ONCE).filter_map(future::ready).collect().await
    }

    async fn sign(&self, target: &Target, wanted: &Wanted) -> Result<Fresh, Error> {
        let Wanted { prepared, witness, algorithm, .. } = wanted;
        let signed = witness.sign(*algorithm, prepared.sha256()).await?;
        let asked = verify::Wanted { manifest: notation::Target::of(&target.subject), reference: target.reference(wanted) };
        let artifact = prepared.assemble(signed.raw(), witness.public_key());
        let artifact = artifact.map_err(|error| Error::Unverified(verify::Rejection::Malformed(error.to_string())))?;
        verify::fresh(artifact, &asked, witness, *algorithm, &signed, self.clock.now()).map_err(Error::Unverified)
    }
}

fn intent(target: &Target, wanted: &Wanted) -> Intent {
    let subject = &target.subject;
    Intent {
        message_id: wanted.message_id.clone(),
        rule: wanted.first.rule.name.clone(),
        witness: wanted.witness.name().to_owned(),
        key: wanted.witness.resolved_key().to_owned(),
        algorithm: wanted.algorithm,
        format: wanted.prepared.format().name(),
        registry: subject.registry().clone(),
        repository: subject.repository().clone(),
        digest: subject.digest().clone(),
        reference: target.reference(wanted),
        payload_sha256: *wanted.prepared.sha256(),
    }
}

/// The tag that a signature names.
fn tag_of(wanted: &Wanted) -> Option<&Tag> {
    wanted.prepared.reference()?.tag.as_ref()
}

/// One error, which all that are open share.
fn fail_open<'a>(answers: impl IntoIterator<Item = &'a OnceLock<Written>>, error: Error) {
    let error = Arc::new(error);
    for answer in answers {
        drop(answer.set(Written::Failed(Error::Shared(error.clone()))));
    }
}
