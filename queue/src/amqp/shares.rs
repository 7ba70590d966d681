//! Who has which partition.
//!
//! The broker gives a partition to whoever consumed it first, and to the next in line when that one goes: the first replica to
//! come would have them all, and the others would stand by. So they share: replicas know each other by their reports, and when
//! those have been the same for a while, each lets go of what is another's share, and lines up for it again behind the others.
//! Nothing is agreed on. As long as two replicas see it differently, a partition may have a holder that it is not meant for;
//! it never has two.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::{sleep, timeout};

use super::{
    Core,
    session::{Session, Source},
    settle::Chore,
    stats::BEAT,
    supervisor::arrive,
};
use crate::Error;

/// How long what is in hand of a partition may take until others have it. Meanwhile nothing more of it is handed out.
const PATIENCE: Duration = Duration::from_secs(5);

/// Gives others their share, for ever.
pub(super) async fn watch(core: &Core, session: &Session) {
    // Whoever is alone has nothing to give. One that was gone for a moment stands behind the others even in what is its own.
    let mut settled = BTreeMap::new();
    let mut last = settled.clone();
    loop {
        sleep(BEAT).await;
        let sharing = core.sharing();
        if sharing == last && sharing != settled && core.consumes() {
            match give(core, session, &core.replicas()).await {
                Ok(true) => settled.clone_from(&sharing),
                // Another time.
                Ok(false) => {}
                // It ends the session, too.
                Err(_) => return std::future::pending().await,
            }
        }
        last = sharing;
    }
}

/// Lets go of what is not ours. False if something could not be let go of.
async fn give(core: &Core, session: &Session, replicas: &BTreeSet<String>) -> Result<bool, Error> {
    let mut done = true;
    for (place, (route, queue)) in core.topology.layout().queues().enumerate() {
        let source = Source::Partition { route };
        let Some(number) = session.number_of(&source).filter(|_| holder(replicas, place) != Some(&core.options.replica)) else {
            continue;
        };
        core.inbox.freeze(number);
        if timeout(PATIENCE, core.inbox.let_go_of(number)).await.is_err() {
            core.inbox.thaw(number);
            done = false;
            continue;
        }
        release(core, session, number).await?;
        if !core.consumes() {
            return Ok(true);
        }
        session.consume(source, &queue.name, core.options.window).await?;
    }
    Ok(done)
}

/// The sources that are our share and that nobody else says are theirs. Of a partition from which nothing has come yet the broker
/// does not tell whose it is, and it is this when all have given away what is not theirs.
pub(super) fn ours(core: &Core, session: &Session) -> Vec<usize> {
    // Others may not have said yet what is theirs; and nobody can while the broker takes nothing.
    if !core.consumes() || session.is_closing() || !session.has_heard_for(BEAT + BEAT) || session.blocked().is_some() {
        return vec![];
    }
    let (replicas, others) = (core.replicas(), core.others());
    let of_others = |route: &str| others.iter().flat_map(|report| &report.partitions).any(|held| held.name == route);
    let layout = core.topology.layout();
    let ours = layout
        .queues()
        .enumerate()
        .filter(|(place, (route, _))| holder(&replicas, *place) == Some(&core.options.replica) && !of_others(route));
    ours.filter_map(|(_, (route, _))| session.number_of(&Source::Partition { route })).collect()
}

/// Whose share a partition is.
fn holder(replicas: &BTreeSet<String>, place: usize) -> Option<&String> {
    replicas.iter().nth(place % replicas.len().max(1))
}

/// Ends a consumer, and lets others have what it brought. First nothing of it may be in hand: the broker gives the partition
/// away at once, and with it messages of the same keys.
pub(super) async fn release(core: &Core, session: &Session, number: usize) -> Result<(), Error> {
    tokio::select! {
        () = core.inbox.let_go_of(number) => {}
        () = session.failed() => {}
    }
    session.leave(number).await?;
    session.gather(|source, delivery| arrive(core, session, source, delivery));
    // They are in the queue again before anybody counts.
    let _pass = core.moves.pass().await;
    for held in core.inbox.take_source(number) {
        core.chore(Chore::Return(held)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_differ_by_one_at_most() {
        for many in 1..6 {
            let replicas: BTreeSet<String> = (0..many).map(|n| n.to_string()).collect();
            let share = |replica: &String| (0..8).filter(|place| holder(&replicas, *place) == Some(replica)).count();
            let shares: Vec<_> = replicas.iter().map(share).collect();
            assert_eq!(shares.iter().sum::<usize>(), 8);
            assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1, "{shares:?}");
        }
        assert_eq!(holder(&BTreeSet::new(), 3), None);
    }
}
