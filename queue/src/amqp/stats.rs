//! What is in the queue, counted on the broker, here, and by the other replicas.
//!
//! The broker knows what is ready in its queues and what waits; what it has delivered is known to whoever has it. So each
//! replica tells the others every two seconds what it holds. What one process does is counted exactly as soon as it is done;
//! what others hold is as old as their last report. Queues are counted one after the other, in the order that messages take, so
//! that none is missed: one whose wait ends in between is counted twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, future::join_all};
use jiff::Timestamp;
use lapin::types::{AMQPValue, FieldTable};
use tokio::time::{Instant, timeout};

use super::{
    Core,
    envelope::Envelope,
    flags, lock,
    session::{Session, Source, lost},
    shares, supervisor,
};
use crate::{Error, Partition, Stats};

/// How often the replicas tell each other how they are.
pub(super) const BEAT: Duration = Duration::from_secs(2);
/// A replica that was silent for so long is gone.
const SILENCE: Duration = Duration::from_secs(7);
/// Retries whose time of push is remembered, at most.
const WAITING: usize = 50_000;
/// How long it may take to find out how old something is that nobody has.
const AGE: Duration = Duration::from_secs(3);
/// The longest report that is read, in bytes.
const REPORT: usize = 64 * 1024;

/// What a replica holds.
#[derive(Clone, Debug)]
pub(super) struct Report {
    at: Instant,
    /// Which of its sessions it is from; 0 if it does not say, as older versions do not.
    session: u64,
    /// How many partitions it shares with the others; none if it leaves them to those.
    shares: u16,
    pub partitions: Vec<Partition>,
    dead: u64,
    /// On their way from one queue into another.
    moving: u64,
    oldest: Option<Timestamp>,
}

/// What this replica has handed back.
#[derive(Debug)]
pub(super) struct Waiting {
    pushed_at: Timestamp,
    since: Instant,
    wait: Duration,
}

impl Waiting {
    /// Whether it has come out of its delay queue by now, however late that was: `topology.rs` says how late it may be.
    fn is_over(&self) -> bool {
        self.since.elapsed() > 2 * self.wait + BEAT
    }
}

pub(super) async fn read(core: &Core) -> Result<Stats, Error> {
    let session = core.session()?;
    if !core.options.consume {
        // Others have most of it: by then each has told so.
        session.has_lived_for(BEAT + Duration::from_millis(500)).await;
    }
    let halted = core.moves.halt().await;
    let delays = async {
        let delays: Vec<_> = core.topology.delays().collect();
        join_all(delays.iter().map(|queue| session.depth(queue))).await.into_iter().collect::<Result<Vec<_>, _>>()
    };
    let (history, discarded) = (core.topology.history(), core.topology.discarded());
    let pushed = async {
        let pushed = core.past.pushed.total(&session, &history).await?;
        Ok((pushed, core.past.reach(core, &session, pushed.end).await?))
    };
    let (delays, (pushed, history), discarded) = tokio::try_join!(delays, pushed, core.discarded.total(&session, &discarded))?;

    // With what is left in others, and goes to ours.
    let (layout, others) = (core.topology.layout(), session.layouts());
    let own = layout.queues().map(|(route, queue)| (true, route, queue.name));
    let drained = others.iter().flat_map(|layout| layout.queues().map(|(route, queue)| (false, route, queue.name)));
    let partitions: Vec<(bool, String, String)> = own.chain(drained).collect();
    let depths = join_all(partitions.iter().map(|(.., queue)| session.depth(queue))).await;
    let stray = session.depth(&core.topology.stray()).await?.0;
    // The broker sends deliveries and answers in order on this channel: whatever was out of a queue when it was counted is
    // here now.
    let dead = session.depth(&core.topology.dead()).await?.0;
    session.gather(|source, delivery| supervisor::arrive(core, &session, source, delivery));

    let own = own_partitions(core, &session);
    let mut stats = Stats {
        pushed_total: pushed.count,
        discarded_total: discarded.count,
        ready: stray + core.moves.under_way(),
        waiting: delays.iter().map(|(depth, _)| depth).sum(),
        in_flight: 0,
        dead: dead + core.graveyard.held(),
        oldest: core.oldest(),
        history,
        partitions: vec![],
    };
    let (others, mut lying) = (core.others(), stray);
    for report in &others {
        stats.dead += report.dead;
        stats.ready += report.moving;
        stats.oldest = older(stats.oldest, report.oldest);
    }
    for ((is_own, route, _), depth) in partitions.into_iter().zip(depths) {
        let mut partition = Partition { name: route.clone(), ready: depth?.0, ..Partition::default() };
        lying += partition.ready;
        let held = others.iter().flat_map(|report| &report.partitions).chain(&own).filter(|held| held.name == route);
        for held in held {
            partition.ready += held.ready;
            partition.in_flight += held.in_flight;
            partition.oldest = older(partition.oldest, held.oldest);
            // Who has something of it knows better than who has it by its share.
            if partition.holder.is_none() || held.ready + held.in_flight > 0 {
                partition.holder.clone_from(&held.holder);
            }
        }
        stats.ready += partition.ready;
        stats.in_flight += partition.in_flight;
        if is_own || partition.holder.is_some() || partition.ready > 0 {
            stats.partitions.push(partition);
        }
    }
    // What is in hand from a connection that is gone has no partition any more.
    let in_hand = core.inbox.level().in_hand;
    let with_partition: u64 = own.iter().map(|held| held.in_flight).sum();
    stats.in_flight += in_hand.saturating_sub(with_partition);
    // One whose wait ended in between is in both numbers.
    let lying = lying.max(stats.waiting);
    if stats.oldest.is_none() && lying > 0 {
        drop(halted);
        stats.oldest = age_of(core, &session, lying).await;
    }
    Ok(stats)
}

/// What lies on the broker does not show how old it is, unless it is consumed. But no two were pushed as one, so the oldest of so
/// many is as old as that many pushes ago at least. None if the broker does not say so soon: the counts are worth more.
async fn age_of(core: &Core, session: &Arc<Session>, many: u64) -> Option<Timestamp> {
    let answer = timeout(AGE, core.past.last_but(core, session, many)).await.unwrap_or_else(|_| Err(lost()));
    if let Err(error) = &answer {
        tracing::debug!(error = error as &dyn std::error::Error, "no age is told of what lies on the broker");
    }
    answer.ok().flatten()
}

/// With those that are idle and ours.
fn own_partitions(core: &Core, session: &Session) -> Vec<Partition> {
    let mut levels = core.inbox.levels();
    for source in session.ours().into_iter().chain(shares::ours(core, session)) {
        levels.entry(source).or_default();
    }
    let held = levels.into_iter().filter_map(|(source, level)| {
        let Some(Source::Partition { route: name }) = session.source(source) else { return None };
        Some(Partition {
            name,
            holder: Some(core.options.replica.clone()),
            ready: level.waiting,
            in_flight: level.in_hand,
            oldest: level.oldest,
        })
    });
    held.collect()
}

fn older(one: Option<Timestamp>, other: Option<Timestamp>) -> Option<Timestamp> {
    [one, other].into_iter().flatten().min()
}

/// Tells the other replicas what this one holds.
pub(super) async fn report(core: Arc<Core>, session: Arc<Session>) {
    core.graveyard.tidy(&core).await;
    let shares = if core.consumes() { core.topology.partitions } else { 0 };
    let mut text =
        format!("session {}\nshares {shares}\ndead {}\nmoving {}\n", session.mark, core.graveyard.held(), core.moves.under_way());
    let shown = |time: Option<Timestamp>| time.map_or(0, |time| i64::try_from(time.as_nanosecond()).unwrap_or(i64::MAX));
    text.push_str(&format!("oldest {}\n", shown(core.oldest())));
    for held in own_partitions(&core, &session) {
        text.push_str(&format!("{} {} {} {}\n", held.name, held.ready, held.in_flight, shown(held.oldest)));
    }
    // The next one is soon.
    let _ = session.tell(&core.topology.replicas(), &core.options.replica, text.as_bytes()).await;
    core.count_on(&session).await;
}

/// Hears the other replicas.
pub(super) async fn listen(core: &Arc<Core>, session: &Arc<Session>) {
    let listening = async {
        let channel = session.channel().await?;
        // The newest of a few reports is what matters.
        let mut arguments = FieldTable::default();
        arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(1000));
        let queue = session.asked(channel.queue_declare("".into(), flags::OWN_QUEUE, arguments)).await?.name().clone();
        let exchange = core.topology.replicas();
        let bound = channel.queue_bind(queue.clone(), exchange.as_str().into(), "".into(), flags::BIND, FieldTable::default());
        session.asked(bound).await?;
        let listening = channel.basic_consume(queue, "reports".into(), flags::LISTEN, FieldTable::default());
        let consumer = session.asked(listening).await?;
        Ok::<_, Error>((channel, consumer))
    };
    if let Ok((_channel, mut reports)) = listening.await {
        session.hears();
        while let Some(Ok(delivery)) = reports.next().await {
            let replica = delivery.properties.app_id().as_ref().map(ToString::to_string).unwrap_or_default();
            if replica != core.options.replica
                && delivery.data.len() <= REPORT
                && let Ok(text) = str::from_utf8(&delivery.data)
            {
                let report = parse(&replica, text);
                lock(&core.others).insert(replica, report);
            }
        }
    }
    // Whatever ended it ends the session as well.
    futures::future::pending::<()>().await;
}

/// Tolerant: another version may say more.
fn parse(replica: &str, text: &str) -> Report {
    let mut report = Report { at: Instant::now(), session: 0, shares: 0, partitions: vec![], dead: 0, moving: 0, oldest: None };
    let time = |word: &str| {
        word.parse().ok().filter(|time| *time > 0).and_then(|time: i64| Timestamp::from_nanosecond(time.into()).ok())
    };
    for line in text.lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["session", mark] => report.session = mark.parse().unwrap_or_default(),
            ["shares", number] => report.shares = number.parse().unwrap_or_default(),
            ["dead", number] => report.dead = number.parse().unwrap_or_default(),
            ["moving", number] => report.moving = number.parse().unwrap_or_default(),
            ["oldest", at] => report.oldest = time(at),
            [name, ready, in_flight, oldest] => report.partitions.push(Partition {
                name: name.to_owned(),
                holder: Some(replica.to_owned()),
                ready: ready.parse().unwrap_or_default(),
                in_flight: in_flight.parse().unwrap_or_default(),
                oldest: time(oldest),
            }),
            _ => {}
        }
    }
    report
}

impl Core {
    /// Counts what this replica has sent, so that its next records say how far that was: nobody has to begin far back.
    async fn count_on(&self, session: &Arc<Session>) {
        for (counter, stream) in [(&self.past.pushed, self.topology.history()), (&self.discarded, self.topology.discarded())] {
            if counter.is_behind(session)
                && let Err(error) = counter.total(session, &stream).await
            {
                tracing::debug!(error = &error as &dyn std::error::Error, stream, "not counted this time");
            }
        }
    }

    pub(super) fn others(&self) -> Vec<Report> {
        let mut others = lock(&self.others);
        others.retain(|_, report| report.at.elapsed() < SILENCE);
        others.values().cloned().collect()
    }

    /// Those that share the partitions of our layout, this one included.
    pub(super) fn replicas(&self) -> BTreeSet<String> {
        self.sharing().into_keys().chain([self.options.replica.clone()]).collect()
    }

    /// The others that share the partitions of our layout, with the session that each is in.
    pub(super) fn sharing(&self) -> BTreeMap<String, u64> {
        let others = lock(&self.others);
        let sharing =
            others.iter().filter(|(_, report)| report.at.elapsed() < SILENCE && report.shares == self.topology.partitions);
        sharing.map(|(replica, report)| (replica.clone(), report.session)).collect()
    }

    /// When the oldest message was pushed that this replica holds, or handed back to wait. What waits from before a restart, or
    /// lies behind what it holds, is not known until it comes.
    fn oldest(&self) -> Option<Timestamp> {
        let mut waiting = lock(&self.waiting);
        // It may have come to another replica.
        waiting.retain(|_, wait| !wait.is_over());
        older(self.inbox.level().oldest, waiting.values().map(|wait| wait.pushed_at).min())
    }

    /// It waits for as many milliseconds in a delay queue.
    pub(super) fn note_waiting(&self, envelope: &Envelope, wait: u64) {
        let mut waiting = lock(&self.waiting);
        if waiting.len() < WAITING {
            let wait = Waiting { pushed_at: envelope.pushed_at, since: Instant::now(), wait: Duration::from_millis(wait) };
            waiting.insert(envelope.message.id.clone(), wait);
        }
    }

    pub(super) fn no_longer_waiting(&self, envelope: &Envelope) {
        lock(&self.waiting).remove(&envelope.message.id);
    }

    /// Reports are of replicas that are connected to the same broker as we were.
    pub(super) fn forget_others(&self) {
        lock(&self.others).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_of_another_version_is_read_as_far_as_it_goes() {
        let report = parse("b", "dead 3\nmoving 4\nwhatever\noldest 0\n8.1 2 1 1000\n8.2 x y z\nnew thing here and there\n");
        assert_eq!((report.dead, report.moving, report.oldest), (3, 4, None));
        let [one, other] = &report.partitions[..] else { panic!("{report:?}") };
        assert_eq!((one.name.as_str(), one.ready, one.in_flight), ("8.1", 2, 1));
        assert_eq!(one.oldest, Timestamp::from_nanosecond(1000).ok());
        assert_eq!((other.ready, other.in_flight, other.oldest), (0, 0, None));
    }

    #[test]
    fn oldest_is_the_least() {
        let at = |second| Timestamp::from_second(second).ok();
        assert_eq!([older(at(1), at(2)), older(None, at(2)), older(None, None)], [at(1), at(2), None]);
    }
}
