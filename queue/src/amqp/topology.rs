//! What there is on the broker, each argument with its reason.
//!
//! ```text
//! push ─▶ accept ─┬─▶ events.N.i (one a partition) ─▶ us ─▶ ack
//!                 └─▶ history                          ├─▶ delay.k ─ its time ─▶ again ─▶ events.N.i
//!                                                      └─▶ dead ─▶ replay ─▶ again ─▶ events.N.i
//!                                                                └▶ discard ─▶ discarded (receipts)
//! again ─ of a layout that is gone ─▶ stray ─▶ us ─▶ again, with the partition that its key has now
//! events.M.j ─ of another layout, that nobody consumes ─▶ us ─▶ again, likewise
//! ```
//!
//! Every name begins with the prefix and the version of this topology, so that a later one can live beside it. Names of
//! partitions have the number of partitions as well: another number is another layout, and the old one is drained.
//!
//! # Another number of partitions
//!
//! Which layouts there are is written down on the broker as bindings of the exchange `layouts`, with the number as routing key,
//! made before the first queue of a layout. Each replica asks for each number, when it connects and every ten seconds, with a
//! message that comes back if there is none. (Asking for a queue would be an error in the broker's log each time.)
//!
//! A replica consumes all partitions of its own layout first, and then those of others that have *no* consumer. What comes from
//! those it hands to nobody: it goes, copied and confirmed, to its key's partition in the replica's own layout. So
//!
//! - nothing is stranded, whatever comes late: retries come back from the delay queues to the layout that they were in, pushes
//!   go on coming from replicas that have the old number still, and both find a consumer there;
//! - with one number in all replicas, a key is in one hand at a time: only one layout's messages are handed out, and what is
//!   in the other lies there or waits in line;
//! - as long as replicas of two numbers run (a rolling restart), a key is in one hand *a layout*. Two pushes of one image
//!   that two such replicas took, or a retry of the old layout and a push into the new one, may be handled at once, as after
//!   a redelivery. It ends with the last replica of the old number, whose layout has a consumer until then;
//! - two replicas do not hand the same messages to each other for ever: to drain the other's layout, each would have to have found
//!   it without a consumer while the other, connected, consumes it. Should a broker that lags behind make it seem so,
//!   each further move waits longer than the last.
//!
//! Queues of old layouts stay, empty. To delete one safely, the broker would have to do it only if it is empty and unused, which
//! quorum queues do not offer (3.10 ends the connection of who asks); and whatever is looked up before, a replica with the
//! old number may push right after. `queue/rabbitmq/README.md` says how an administrator removes them.

use std::time::Duration;

use lapin::{
    Channel, ErrorKind, ExchangeKind,
    protocol::{AMQPErrorKind, AMQPSoftError},
    types::{AMQPValue, FieldTable},
};

use super::{
    flags,
    session::{in_time, unavailable},
};
use crate::{Error, PartitionKey};

/// Raised when anything below changes in a way that a broker would refuse.
const VERSION: &str = "v1";
/// The shortest wait of a delay queue, in milliseconds. Each further one has twice the wait.
const FIRST_RUNG: u64 = 128;
/// The last one waits 17 minutes; whoever has to wait longer comes round again.
const RUNGS: u32 = 14;
/// The largest number of partitions: so many layouts are looked for.
const MOST: u16 = 64;
/// Above the number of deliveries that any message can see: see [`kept_for_good`].
const NEVER: i64 = 1_000_000_000;

/// The names and arguments of everything.
#[derive(Clone, Debug)]
pub(super) struct Topology {
    prefix: String,
    pub partitions: u16,
}

impl Topology {
    pub fn new(prefix: &str, partitions: u16) -> Self {
        Self { prefix: format!("{prefix}.{VERSION}"), partitions: partitions.clamp(1, MOST) }
    }

    fn name(&self, rest: &str) -> String {
        format!("{}.{rest}", self.prefix)
    }

    /// The exchange that takes pushes.
    pub fn accept(&self) -> String {
        self.name("accept")
    }

    /// The exchange that takes what comes another time: retries, replays.
    pub fn again(&self) -> String {
        self.name("again")
    }

    /// Where the replicas tell each other how they are.
    pub fn replicas(&self) -> String {
        self.name("replicas")
    }

    pub fn history(&self) -> String {
        self.name("history")
    }

    pub fn discarded(&self) -> String {
        self.name("discarded")
    }

    pub fn dead(&self) -> String {
        self.name("dead")
    }

    pub fn stray(&self) -> String {
        self.name("stray")
    }

    /// The exchange whose bindings say which layouts there are.
    pub fn layouts(&self) -> String {
        self.name("layouts")
    }

    pub fn probe(&self) -> String {
        self.name("probe")
    }

    /// An exclusive queue of this name is a lock.
    pub fn lock(&self, what: &str) -> String {
        self.name(&format!("lock.{what}"))
    }

    pub fn delays(&self) -> impl Iterator<Item = String> {
        (0..RUNGS).map(|rung| self.name(&format!("delay.{}", FIRST_RUNG << rung)))
    }

    /// The delay queue for a wait, the time to wait in it, and the time to wait after that, in milliseconds.
    pub fn delay(&self, wait: Duration) -> (String, u64, u64) {
        // The broker cuts off fractions of a millisecond.
        let wait = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).saturating_add(2);
        let here = wait.min(FIRST_RUNG << (RUNGS - 1));
        let rung = (0..RUNGS).map(|rung| FIRST_RUNG << rung).find(|rung| *rung >= here).unwrap_or(here);
        (self.name(&format!("delay.{rung}")), here, wait - here)
    }

    /// The layout that is configured.
    pub fn layout(&self) -> Layout {
        Layout { prefix: self.prefix.clone(), partitions: self.partitions }
    }

    /// All others that may be.
    pub fn other_layouts(&self) -> impl Iterator<Item = Layout> {
        let others = (1..=MOST).filter(|partitions| *partitions != self.partitions);
        others.map(|partitions| Layout { prefix: self.prefix.clone(), partitions })
    }

    /// Everything but the partitions' queues.
    pub fn exchanges(&self) -> Vec<Exchange> {
        vec![
            // Direct: the routing key is the partition. No alternate exchange: what no queue takes has to come back.
            Exchange { name: self.accept(), kind: ExchangeKind::Direct, arguments: vec![] },
            // A retry may come back to a layout that has been drained meanwhile: it must not be lost.
            Exchange {
                name: self.again(),
                kind: ExchangeKind::Direct,
                arguments: vec![("alternate-exchange", text(&self.stray()))],
            },
            Exchange { name: self.stray(), kind: ExchangeKind::Fanout, arguments: vec![] },
            Exchange { name: self.replicas(), kind: ExchangeKind::Fanout, arguments: vec![] },
            // Direct: the routing key is the number of partitions of a layout. What is asked for by it ends in `probe`.
            Exchange { name: self.layouts(), kind: ExchangeKind::Direct, arguments: vec![] },
        ]
        .into_iter()
        // One a delay queue: the routing key that is published with is the partition to come back to, not the queue.
        .chain(self.delays().map(|name| Exchange { name, kind: ExchangeKind::Fanout, arguments: vec![] }))
        .collect()
    }

    /// Everything but the partitions' queues.
    pub fn queues(&self) -> Vec<Queue> {
        let mut queues = vec![
            Queue::new(self.dead(), kept_for_good()),
            Queue::new(self.stray(), [kept_for_good(), one_consumer()].concat()),
            // One message at most: only whether it is taken matters. The newest stays.
            Queue::new(
                self.probe(),
                [kept_for_good(), vec![("x-max-length", number(1)), ("x-overflow", text("drop-head"))]].concat(),
            ),
            // A copy of each push, about 2 KiB: a million of them. Segments are forgotten whole.
            Queue::new(self.history(), stream(2 << 30, 16 << 20)),
            // Receipts, of which only the number matters: the smallest segment there may be is more than enough of them.
            Queue::new(self.discarded(), stream(1 << 20, 64 << 10)),
        ];
        let delays = self.delays().enumerate().map(|(rung, name)| Queue::new(name, self.delayed(FIRST_RUNG << rung)));
        queues.extend(delays);
        queues
    }

    /// Out of exchange, with routing key, into queue; partitions aside.
    pub fn bindings(&self) -> Vec<(String, String, String)> {
        let same = |name: String| (name.clone(), String::new(), name);
        self.delays().map(same).chain([same(self.stray())]).collect()
    }

    fn delayed(&self, rung: u64) -> Arguments {
        let mut arguments = kept_for_good();
        arguments.extend([
            // Each message has its own expiration, which is at most this. Only the first in line expires, so a message may
            // come as much later as the one before it waits longer: half of this at most.
            ("x-message-ttl", number(rung.cast_signed())),
            // Back to the partition it came from: the routing key stays the one it was published with.
            ("x-dead-letter-exchange", text(&self.again())),
            // The message is gone from here only when the partition's queue has confirmed it. The default loses those for
            // which the partition's queue has no leader at that moment.
            ("x-dead-letter-strategy", text("at-least-once")),
            // What that strategy demands, should a policy ever limit the length: the newest is refused, not the oldest lost.
            ("x-overflow", text("reject-publish")),
        ]);
        arguments
    }
}

/// The partitions' queues, for one number of partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    prefix: String,
    pub partitions: u16,
}

impl Layout {
    /// The routing key of the partition that a key belongs to.
    pub fn route(&self, key: &PartitionKey) -> String {
        format!("{}.{}", self.partitions, fnv1a(key.0.as_bytes()) % u64::from(self.partitions))
    }

    /// What it is known by.
    pub fn mark(&self) -> String {
        self.partitions.to_string()
    }

    /// Each routing key, and the queue it leads to.
    pub fn queues(&self) -> impl Iterator<Item = (String, Queue)> {
        (0..self.partitions).map(|partition| {
            let route = format!("{}.{partition}", self.partitions);
            let queue = Queue::new(format!("{}.events.{route}", self.prefix), [kept_for_good(), one_consumer()].concat());
            (route, queue)
        })
    }
}

type Arguments = Vec<(&'static str, AMQPValue)>;

pub(super) struct Exchange {
    pub name: String,
    pub kind: ExchangeKind,
    pub arguments: Arguments,
}

pub(super) struct Queue {
    pub name: String,
    pub arguments: Arguments,
}

impl Queue {
    fn new(name: String, arguments: Arguments) -> Self {
        Self { name, arguments }
    }

    /// One that loses nothing, of this name.
    pub fn durable(name: &str) -> Self {
        Self::new(name.to_owned(), kept_for_good())
    }
}

fn kept_for_good() -> Arguments {
    vec![
        // Replicated, and the confirm follows an fsync on a majority: what a registry was told is durable is.
        ("x-queue-type", text("quorum")),
        // A message that was delivered more often would be dropped. RabbitMQ 4 has 20 if nothing is said; 3.10 takes no
        // "unlimited". Whether an event was tried often enough is for the pipeline to say.
        ("x-delivery-limit", number(NEVER)),
    ]
}

/// Counted by [`super::stream::Counter`], whatever is forgotten.
///
/// A broker confirms a record of a stream when it is written, not when it is synced. Killed, it loses none; without power, it
/// may lose the last half minute of them (a cluster: if most of it is without power at once). The events themselves are in
/// quorum queues and are not lost with it: they would be missing from the totals and from the past.
fn stream(bytes: i64, segment: i64) -> Arguments {
    vec![
        // Read by all replicas at once, from anywhere, without taking anything away.
        ("x-queue-type", text("stream")),
        // Bytes on each broker, after which the oldest segment is forgotten: what bounds it. An administrator's policy
        // (`max-length-bytes`, `max-age`) may make it less. No `x-max-age` here: it would have to be what `[queue] history`
        // is, and a queue's arguments cannot be changed without losing the queue, and the totals with it. Also, age is only
        // looked at when a segment is full, so it would promise more than it keeps. What is too old is not shown.
        ("x-max-length-bytes", number(bytes)),
        // Bytes of a segment.
        ("x-stream-max-segment-size-bytes", number(segment)),
    ]
}

fn one_consumer() -> Arguments {
    // One replica at a time holds a partition; the others stand by. So equal keys are never in two replicas' hands.
    vec![("x-single-active-consumer", AMQPValue::Boolean(true))]
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

fn number(number: i64) -> AMQPValue {
    AMQPValue::LongLongInt(number)
}

/// FNV-1a, 64 bits: the same in every replica and version, whatever the machine.
pub(super) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Declares everything of this layout that is not there yet.
pub(super) async fn declare(channel: &Channel, topology: &Topology) -> Result<(), Error> {
    for exchange in topology.exchanges() {
        let arguments = table(exchange.arguments);
        let declaring =
            channel.exchange_declare(exchange.name.as_str().into(), exchange.kind, flags::DECLARE_EXCHANGE, arguments);
        in_time(declaring).await?.map_err(|error| refused("exchange", &exchange.name, error))?;
    }
    for queue in topology.queues() {
        declare_queue(channel, queue).await?;
    }
    for (exchange, route, queue) in topology.bindings() {
        bind(channel, &exchange, &route, &queue).await?;
    }
    declare_layout(channel, topology, &topology.layout()).await
}

/// Whether nothing of ours is on the broker. The channel is not to be used again.
pub(super) async fn is_bare(channel: &Channel, topology: &Topology) -> Result<bool, Error> {
    let (name, options) = (topology.accept(), flags::LOOK_FOR_EXCHANGE);
    let declaring = channel.exchange_declare(name.as_str().into(), ExchangeKind::Direct, options, FieldTable::default());
    match in_time(declaring).await? {
        Ok(()) => {
            // It does no harm if it stays.
            let _ = in_time(channel.close(200, "OK".into())).await;
            Ok(false)
        }
        Err(error) if soft_error(&error) == Some(AMQPSoftError::NOTFOUND) => Ok(true),
        Err(error) => Err(unavailable(format!("the exchange {name} could not be looked for"), error)),
    }
}

/// What the broker did not like, if it has only ended the channel for it.
pub(super) fn soft_error(error: &lapin::Error) -> Option<AMQPSoftError> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(error) => Some(error.clone()),
            AMQPErrorKind::Hard(_) => None,
        },
        _ => None,
    }
}

pub(super) async fn declare_layout(channel: &Channel, topology: &Topology, layout: &Layout) -> Result<(), Error> {
    // First: nobody may have messages in a layout that others cannot find.
    bind(channel, &topology.layouts(), &layout.mark(), &topology.probe()).await?;
    for (route, queue) in layout.queues() {
        let name = queue.name.clone();
        declare_queue(channel, queue).await?;
        bind(channel, &topology.accept(), &route, &name).await?;
        bind(channel, &topology.again(), &route, &name).await?;
        // A copy of each push; retries and replays go another way.
        bind(channel, &topology.accept(), &route, &topology.history()).await?;
    }
    Ok(())
}

pub(super) async fn declare_queue(channel: &Channel, queue: Queue) -> Result<(), Error> {
    let declaring = channel.queue_declare(queue.name.as_str().into(), flags::DECLARE_QUEUE, table(queue.arguments));
    in_time(declaring).await?.map(drop).map_err(|error| refused("queue", &queue.name, error))
}

pub(super) async fn bind(channel: &Channel, exchange: &str, route: &str, queue: &str) -> Result<(), Error> {
    let binding = channel.queue_bind(queue.into(), exchange.into(), route.into(), flags::BIND, FieldTable::default());
    in_time(binding).await?.map_err(|error| refused("queue", queue, error))
}

fn table(arguments: Arguments) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert(name.into(), value);
    }
    table
}

/// Why the broker would not declare something.
fn refused(kind: &'static str, name: &str, error: lapin::Error) -> Error {
    if soft_error(&error) != Some(AMQPSoftError::PRECONDITIONFAILED) {
        return unavailable(format!("the {kind} {name} could not be declared"), error);
    }
    // "PRECONDITION_FAILED - inequivalent arg 'x-max-age' for queue …"
    let said = error.to_string();
    let argument = said.split_once("arg '").and_then(|(_, rest)| rest.split_once('\'')).map(|(argument, _)| argument.to_owned());
    Error::Mismatch { kind, name: name.to_owned(), argument, source: Box::new(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology() -> Topology {
        Topology::new("countersign", 8)
    }

    #[test]
    fn partition_of_a_key_is_the_same_for_ever() {
        let route = |key: &str| topology().layout().route(&PartitionKey(key.to_owned()));
        assert_eq!(
            [fnv1a(b""), fnv1a(b"a"), fnv1a(b"foobar")],
            [0xcbf2_9ce4_8422_2325, 0xaf63_dc4c_8601_ec8c, 0x8594_4171_f739_67e8]
        );
        assert_eq!([route(""), route("a"), route("foobar")], ["8.5", "8.4", "8.0"]);
    }

    #[test]
    fn delays_add_up_to_the_wait_and_a_bit() {
        for (wait, expected) in [
            (0, ("countersign.v1.delay.128", 2, 0)),
            (126, ("countersign.v1.delay.128", 128, 0)),
            (127, ("countersign.v1.delay.256", 129, 0)),
            (1_048_574, ("countersign.v1.delay.1048576", 1_048_576, 0)),
            (3_600_000, ("countersign.v1.delay.1048576", 1_048_576, 2_551_426)),
        ] {
            let (queue, here, left) = topology().delay(Duration::from_millis(wait));
            assert_eq!((queue.as_str(), here, left), expected);
        }
        assert_eq!(topology().delays().last().unwrap(), "countersign.v1.delay.1048576");
    }
}
