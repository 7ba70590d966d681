//! Every flag of the protocol that we send, written out with the reason for its value. Arguments of queues are in `topology.rs`.
//!
//! `nowait` is false throughout: of what is not answered one does not hear that it failed.

use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};

pub(super) const DECLARE_EXCHANGE: ExchangeDeclareOptions = ExchangeDeclareOptions {
    // It survives the broker's restart.
    durable: true,
    // It stays when the last queue is unbound.
    auto_delete: false,
    // We publish into it, `stray` aside, which is left alone.
    internal: false,
    // It is made if it is not there.
    passive: false,
    nowait: false,
};

/// As [`DECLARE_EXCHANGE`], of one that is there or not.
pub(super) const LOOK_FOR_EXCHANGE: ExchangeDeclareOptions = ExchangeDeclareOptions {
    // It is not made.
    passive: true,
    ..DECLARE_EXCHANGE
};

pub(super) const DECLARE_QUEUE: QueueDeclareOptions = QueueDeclareOptions {
    // It survives the broker's restart; quorum queues and streams know nothing else.
    durable: true,
    // All replicas use it.
    exclusive: false,
    // It stays when nobody consumes.
    auto_delete: false,
    // It is made if it is not there.
    passive: false,
    nowait: false,
};

/// As [`DECLARE_QUEUE`], of one that is there or not: how many messages and consumers it has.
pub(super) const LOOK_AT_QUEUE: QueueDeclareOptions = QueueDeclareOptions {
    // It is not made.
    passive: true,
    ..DECLARE_QUEUE
};

/// A queue for what is meant for this connection.
pub(super) const OWN_QUEUE: QueueDeclareOptions = QueueDeclareOptions {
    // It has nothing to survive for: it goes with its connection.
    durable: false,
    // Nobody else gets what is in it.
    exclusive: true,
    // It goes with its consumer, too.
    auto_delete: true,
    ..DECLARE_QUEUE
};

/// A queue that is a lock: while one connection has it, another's declaration is refused.
pub(super) const LOCK: QueueDeclareOptions = QueueDeclareOptions {
    // It is held until it is deleted, or its connection ends: it never has a consumer.
    auto_delete: false,
    ..OWN_QUEUE
};

pub(super) const UNLOCK: QueueDeleteOptions = QueueDeleteOptions {
    // Nobody consumes it, nothing is ever in it, and nobody but its holder may delete it.
    if_unused: false,
    if_empty: false,
    nowait: false,
};

pub(super) const BIND: QueueBindOptions = QueueBindOptions { nowait: false };

pub(super) const CONFIRM: ConfirmSelectOptions = ConfirmSelectOptions { nowait: false };

pub(super) const WINDOW: BasicQosOptions = BasicQosOptions {
    // Of each consumer that is begun after it. One for all of a channel is what quorum queues and streams refuse.
    global: false,
};

pub(super) const CONSUME: BasicConsumeOptions = BasicConsumeOptions {
    // RabbitMQ does not know it.
    no_local: false,
    // A message is gone when it was handled, not when it was sent. From a stream nothing goes: an ack there says "go on".
    no_ack: false,
    // Others stand by, or read the same.
    exclusive: false,
    nowait: false,
};

/// Of [`OWN_QUEUE`], where what comes is old as soon as the next is there.
pub(super) const LISTEN: BasicConsumeOptions = BasicConsumeOptions {
    // What is lost with the connection nobody would want afterwards.
    no_ack: true,
    ..CONSUME
};

pub(super) const LEAVE: BasicCancelOptions = BasicCancelOptions { nowait: false };

pub(super) const ACK: BasicAckOptions = BasicAckOptions {
    // This one: those before it may be in hand still.
    multiple: false,
};

pub(super) const ACK_ALL: BasicAckOptions = BasicAckOptions {
    // This one and those before it: they were read in order.
    multiple: true,
};

pub(super) const GIVE_BACK: BasicNackOptions = BasicNackOptions {
    // This one: those before it may be in hand still.
    multiple: false,
    // It is delivered again, and not dropped.
    requeue: true,
};

pub(super) const GIVE_ALL_BACK: BasicNackOptions = BasicNackOptions {
    // This one and those before it: one answer of the broker's keeps their order.
    multiple: true,
    ..GIVE_BACK
};

pub(super) const PUBLISH: BasicPublishOptions = BasicPublishOptions {
    // What no queue takes comes back to us, and is not lost.
    mandatory: true,
    // RabbitMQ knows it no more.
    immediate: false,
};

pub(super) const TELL: BasicPublishOptions = BasicPublishOptions {
    // Whoever wants to hear it listens.
    mandatory: false,
    ..PUBLISH
};
