//! A message as it travels: the body as it is, everything else in properties and headers.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use jiff::Timestamp;
use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable, LongLongInt, ShortString},
};

use crate::{Burial, DeadLetter, Message, PartitionKey};

/// What the basic properties call "persistent": kept on disk. Quorum queues keep everything there; a policy may route a copy
/// elsewhere.
const PERSISTENT: u8 = 2;
/// The longest reason that is sent, in bytes: headers share one frame.
const REASON: usize = 4096;

/// A message on its way, and what has happened to it.
#[derive(Clone, Debug)]
pub(super) struct Envelope {
    pub message: Message,
    pub pushed_at: Timestamp,
    pub attempts: u32,
    pub waited: Duration,
    /// Still to be waited after the delay queue it comes from, in milliseconds.
    pub left: u64,
    /// How often it was moved behind others because its key was busy, or to another layout.
    pub moved: u32,
    /// Why it was handed back last.
    pub reason: Option<String>,
    /// Tells what was published once from what was published again under the same id: each that is read has another; 0 of those
    /// that older versions published.
    pub copy: u64,
}

impl Envelope {
    pub fn new(message: Message, pushed_at: Timestamp) -> Self {
        Self { message, pushed_at, attempts: 0, waited: Duration::ZERO, left: 0, moved: 0, reason: None, copy: 0 }
    }

    pub fn this_copy(&self) -> (String, u64) {
        (self.message.id.clone(), self.copy)
    }

    pub fn moved_once_more(&self) -> Self {
        Self { moved: self.moved.saturating_add(1), ..self.clone() }
    }

    pub fn properties(&self) -> BasicProperties {
        self.with(self.headers())
    }

    fn with(&self, headers: Headers) -> BasicProperties {
        let mut properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
        let mut headers = headers;
        // Both are short strings (255 bytes) in the protocol, and of any length here.
        match ShortString::try_new(self.message.id.clone()) {
            Ok(id) => properties = properties.with_message_id(id),
            Err(_) => headers.text("id", &self.message.id),
        }
        match ShortString::try_new(self.message.content_type.clone()) {
            Ok(content_type) => properties = properties.with_content_type(content_type),
            Err(_) => headers.text("content-type", &self.message.content_type),
        }
        properties.with_headers(headers.0)
    }

    fn headers(&self) -> Headers {
        let mut headers = Headers(FieldTable::default());
        headers.text("key", &self.message.key.0);
        headers.number("copy", fastrand::i64(1..));
        headers.time("pushed-at", self.pushed_at);
        headers.number("attempts", self.attempts.into());
        headers.number("waited", i64::try_from(self.waited.as_nanos()).unwrap_or(i64::MAX));
        if self.left > 0 {
            headers.number("left", i64::try_from(self.left).unwrap_or(i64::MAX));
        }
        if self.moved > 0 {
            headers.number("moved", self.moved.into());
        }
        if let Some(reason) = &self.reason {
            headers.text("retry-reason", cut(reason));
        }
        if let Some(id) = &self.message.replay_of {
            headers.text("replay-of", id);
        }
        headers
    }

    /// Whatever it is: what somebody else put into our queues is handed on under a name of its own, to be looked at.
    pub fn read(properties: &BasicProperties, body: Vec<u8>, now: Timestamp) -> Self {
        let headers = Read::new(properties);
        let id = properties.message_id().as_ref().map(ToString::to_string).or_else(|| headers.text("id"));
        let id = id.unwrap_or_else(|| format!("unnamed-{:016x}", super::topology::fnv1a(&body)));
        let content_type = properties.content_type().as_ref().map(ToString::to_string);
        let key = headers.text("key").unwrap_or_else(|| id.clone());
        Self {
            message: Message {
                id,
                content_type: content_type.or_else(|| headers.text("content-type")).unwrap_or_default(),
                key: PartitionKey(key),
                body: Bytes::from(body),
                replay_of: headers.text("replay-of"),
            },
            pushed_at: headers.time("pushed-at").unwrap_or(now),
            attempts: u32::try_from(headers.number("attempts")).unwrap_or(u32::MAX),
            waited: Duration::from_nanos(headers.number("waited")),
            left: headers.number("left"),
            moved: u32::try_from(headers.number("moved")).unwrap_or(u32::MAX),
            reason: headers.text("retry-reason"),
            copy: headers.number("copy"),
        }
    }

    /// As a dead letter.
    pub fn buried(&self, burial: &Burial, at: Timestamp, by: &str) -> BasicProperties {
        let mut headers = self.headers();
        headers.time("buried-at", at);
        headers.text("buried-by", by);
        headers.text("kind", cut(&burial.kind));
        headers.text("reason", cut(&burial.reason));
        self.with(headers)
    }

    pub fn read_dead(properties: &BasicProperties, body: Vec<u8>, now: Timestamp) -> DeadLetter {
        let headers = Read::new(properties);
        let envelope = Self::read(properties, body, now);
        DeadLetter {
            message: envelope.message,
            burial: Burial { kind: headers.text("kind").unwrap_or_default(), reason: headers.text("reason").unwrap_or_default() },
            pushed_at: envelope.pushed_at,
            buried_at: headers.time("buried-at").unwrap_or(now),
            attempts: envelope.attempts,
        }
    }
}

/// A reason is for people: its beginning says what happened.
fn cut(text: &str) -> &str {
    let end = (0..=REASON.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or_default()]
}

struct Headers(FieldTable);

impl Headers {
    fn text(&mut self, name: &str, text: &str) {
        self.0.insert(name.into(), AMQPValue::LongString(text.into()));
    }

    fn number(&mut self, name: &str, number: i64) {
        self.0.insert(name.into(), AMQPValue::LongLongInt(number));
    }

    fn time(&mut self, name: &str, time: Timestamp) {
        // Nanoseconds since 1970, for the next 230 years.
        self.number(name, LongLongInt::try_from(time.as_nanosecond()).unwrap_or(LongLongInt::MAX));
    }
}

/// Headers that anybody may have written.
pub(super) struct Read<'a>(Option<&'a BTreeMap<ShortString, AMQPValue>>);

impl<'a> Read<'a> {
    pub fn new(properties: &'a BasicProperties) -> Self {
        Self(properties.headers().as_ref().map(FieldTable::inner))
    }

    fn value(&self, name: &str) -> Option<&AMQPValue> {
        self.0?.get(name)
    }

    pub fn text(&self, name: &str) -> Option<String> {
        match self.value(name)? {
            AMQPValue::LongString(text) => Some(text.to_string()),
            AMQPValue::ShortString(text) => Some(text.to_string()),
            _ => None,
        }
    }

    pub fn signed(&self, name: &str) -> Option<i64> {
        self.value(name)?.as_long_long_int()
    }

    pub fn number(&self, name: &str) -> u64 {
        self.signed(name).and_then(|number| u64::try_from(number).ok()).unwrap_or_default()
    }

    pub fn time(&self, name: &str) -> Option<Timestamp> {
        Timestamp::from_nanosecond(self.signed(name)?.into()).ok()
    }
}
