//! Other layouts than ours: what is still in them is handed on to ours. `topology.rs` says what holds meanwhile.

use std::{
    iter,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{
    Core,
    session::{Session, Source},
    topology::{self, Layout},
};
use crate::Error;

/// How often it is looked for other layouts, and for partitions of theirs that nobody consumes.
const LOOK: Duration = Duration::from_secs(10);
/// How soon for the second time: of a replica that has just gone the broker knows a moment later.
const SOON: Duration = Duration::from_secs(1);

/// Looks again and again, for ever.
pub(super) async fn watch(core: &Core, session: &Session) {
    for pause in iter::once(SOON).chain(iter::repeat(LOOK)) {
        tokio::time::sleep(pause).await;
        if let Err(error) = look(core, session).await {
            tracing::debug!(error = &error as &dyn std::error::Error, "other layouts are looked for again soon");
        }
    }
}

/// Gets to know the layouts there are, and takes on their partitions that nobody consumes.
pub(super) async fn look(core: &Core, session: &Session) -> Result<(), Error> {
    let known = session.layouts();
    let unknown: Vec<Layout> = core.topology.other_layouts().filter(|layout| !known.contains(layout)).collect();
    let (exchange, marks) = (core.topology.layouts(), unknown.iter().map(Layout::mark).collect::<Vec<_>>());
    let there = session.leading_somewhere(&exchange, marks).await?;
    for layout in unknown.into_iter().filter(|layout| there.contains(&layout.mark())) {
        learn(core, session, layout).await?;
    }
    for layout in session.layouts() {
        for (route, queue) in layout.queues() {
            let source = Source::Drained { route };
            if !core.consumes() || session.is_closing() || session.all_sources().contains(&source) {
                continue;
            }
            if session.depth(&queue.name).await?.1 == 0 {
                session.consume(source, &queue.name, core.options.window).await?;
                tracing::info!(queue = queue.name, "draining a partition of another layout");
            }
        }
    }
    Ok(())
}

async fn learn(core: &Core, session: &Session, layout: Layout) -> Result<(), Error> {
    let channel = session.channel().await?;
    // Some may be missing, if whoever began to declare them was killed.
    topology::declare_layout(&channel, &core.topology, &layout).await.inspect_err(|error| {
        tracing::warn!(error = error as &dyn std::error::Error, partitions = layout.partitions, "a layout cannot be drained");
    })?;
    session.asked(channel.close(200, "OK".into())).await?;
    session.learn(layout);
    Ok(())
}

/// Messages that go from one queue into another through here. They are in neither while nobody counts, and in one while
/// somebody does.
#[derive(Debug, Default)]
pub(super) struct Moves {
    gate: RwLock<()>,
    under_way: AtomicU64,
}

impl Moves {
    /// A message was delivered that is to be moved.
    pub fn begin(&self) {
        self.under_way.fetch_add(1, Ordering::Relaxed);
    }

    /// It was moved, or will not be.
    pub fn end(&self) {
        self.under_way.fetch_sub(1, Ordering::Relaxed);
    }

    /// To be held from before the copy until [`Moves::end`].
    pub async fn pass(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().await
    }

    /// Nothing is half moved as long as this is held.
    pub async fn halt(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().await
    }

    pub fn under_way(&self) -> u64 {
        self.under_way.load(Ordering::Relaxed)
    }
}
