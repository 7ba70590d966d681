//! CloudEvents 1.0: an event of any kind in its envelope, and the plain form that scripts and relays send.
//!
//! How an envelope is written depends on the road it came by (CloudEvents HTTP and AMQP protocol bindings 1.0): *structured*,
//! the event as one JSON object; *batched*, a list of such; *binary*, its attributes as headers and its data as the body. What
//! the data is, the source's kind says: for [`Kind::CloudEvents`](super::Kind) it is `{repository, tag?, digest, mediaType?,
//! actor?}`, and the event's type ends in `image.pushed`.

use std::{borrow::Cow, collections::BTreeMap};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{HeaderMap, header::CONTENT_TYPE};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    entry::{Entry, Ignored, MOST_EVENTS, Parsed, Push, Refusal, log_id, shortened, unsigned_media_type},
    json::{Text, Unique, loosely},
};
use crate::oci::Tag;

const STRUCTURED: &str = "application/cloudevents";
const BATCHED: &str = "application/cloudevents-batch";

/// A body, and what came with it that says how it is to be read.
#[derive(Debug, Clone, Default)]
pub struct Incoming {
    pub body: Bytes,
    /// As it was sent, parameters included.
    pub content_type: Option<String>,
    /// The attributes of an event in binary mode, decoded, by their names without the protocol's prefix.
    pub attributes: BTreeMap<String, String>,
}

impl Incoming {
    /// By HTTP: attributes are `ce-` headers, percent-encoded (HTTP protocol binding, section 3.1.3).
    #[must_use]
    pub fn by_http(headers: &HeaderMap, body: Bytes) -> Self {
        let text = |value: &http::HeaderValue| value.to_str().ok().map(str::to_owned);
        let decoded = |value: &http::HeaderValue| Some(percent_decode_str(value.to_str().ok()?).decode_utf8().ok()?.into_owned());
        let attributes = headers.iter().filter_map(|(name, value)| {
            let name = name.as_str().strip_prefix("ce-")?;
            Some((name.to_owned(), decoded(value)?))
        });
        Self { body, content_type: headers.get(CONTENT_TYPE).and_then(text), attributes: attributes.collect() }
    }

    /// By a broker: attributes are headers that begin with `cloudEvents:` or `cloudEvents_` (AMQP protocol binding, section
    /// 3.1.3), as they are.
    #[must_use]
    pub fn by_broker(content_type: Option<String>, headers: impl IntoIterator<Item = (String, String)>, body: Bytes) -> Self {
        let attributes = headers.into_iter().filter_map(|(name, value)| {
            let name = name.strip_prefix("cloudEvents:").or_else(|| name.strip_prefix("cloudEvents_"))?;
            Some((name.to_owned(), value))
        });
        Self { body, content_type, attributes: attributes.collect() }
    }

    fn is(&self, prefix: &str) -> bool {
        self.content_type
            .as_deref()
            .and_then(|content_type| content_type.get(..prefix.len()))
            .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    }
}

/// What the data of one event brought.
pub(super) enum Item {
    Push(Push),
    Ignored(Ignored),
    Refused(Refusal),
}

/// The attributes that are looked at. Any may be absent but the version.
#[derive(Debug, Default)]
pub(super) struct Attributes<'a> {
    id: Option<Cow<'a, str>>,
    kind: Option<Cow<'a, str>>,
    time: Option<Cow<'a, str>>,
}

/// Reads the data of one event.
pub(super) type Reader = fn(&Attributes<'_>, &[u8]) -> Result<Vec<Item>, Refusal>;

/// The events in `incoming`, if it is in any of the three modes. `always`: a body whose content type does not say so is taken
/// for a structured one, as some transformers send it.
pub(super) fn parse(incoming: &Incoming, reader: Reader, always: bool) -> Option<Parsed<'_>> {
    let text = || std::str::from_utf8(&incoming.body).map_err(|_| Refusal::CloudEvent("its body is not UTF-8"));
    if incoming.is(BATCHED) {
        return Some(text().and_then(|text| batch(text, reader)));
    }
    if incoming.is(STRUCTURED) {
        return Some(text().map(|text| structured(text, reader)));
    }
    if incoming.attributes.contains_key("specversion") {
        return Some(text().map(|text| entries(text, binary(incoming, reader))));
    }
    always.then(|| text().map(|text| structured(text, reader)))
}

fn batch(text: &str, reader: Reader) -> Parsed<'_> {
    let events: Vec<&RawValue> = serde_json::from_str(text).map_err(Refusal::Malformed)?;
    if events.len() > MOST_EVENTS {
        return Err(Refusal::TooMany(MOST_EVENTS));
    }
    Ok(events.into_iter().flat_map(|event| structured(event.get(), reader)).collect())
}

fn structured(json: &str, reader: Reader) -> Vec<Entry<'_>> {
    entries(json, try_structured(json, reader))
}

/// What is refused of an event is kept as the whole event.
fn entries(json: &str, items: Result<Vec<Item>, Refusal>) -> Vec<Entry<'_>> {
    let entry = |item| match item {
        Item::Push(push) => Entry::Push(push),
        Item::Ignored(reason) => Entry::Ignored(reason),
        Item::Refused(refusal) => Entry::Refused { refusal, json },
    };
    items.map_or_else(|refusal| vec![Entry::Refused { refusal, json }], |items| items.into_iter().map(entry).collect())
}

fn try_structured(json: &str, reader: Reader) -> Result<Vec<Item>, Refusal> {
    #[derive(Deserialize)]
    struct Event<'a> {
        #[serde(borrow, default)]
        specversion: Text<'a>,
        #[serde(borrow)]
        id: Option<&'a RawValue>,
        #[serde(borrow, default)]
        r#type: Text<'a>,
        #[serde(borrow)]
        time: Option<&'a RawValue>,
        #[serde(borrow)]
        data: Option<&'a RawValue>,
        #[serde(borrow, default)]
        data_base64: Text<'a>,
    }
    let _: Unique = serde_json::from_str(json).map_err(Refusal::Malformed)?;
    let event: Event<'_> = serde_json::from_str(json).map_err(Refusal::Malformed)?;
    check_version(event.specversion.get())?;
    let (id, time): (Text<'_>, Text<'_>) = (loosely(event.id), loosely(event.time));
    let attributes = Attributes {
        id: id.get().map(Cow::Borrowed),
        kind: event.r#type.get().map(Cow::Borrowed),
        time: time.get().map(Cow::Borrowed),
    };
    match (event.data, event.data_base64.get()) {
        (Some(data), None) => reader(&attributes, data.get().as_bytes()),
        (None, Some(encoded)) => {
            let data = BASE64_STANDARD.decode(encoded).map_err(|_| Refusal::CloudEvent("its data_base64 is not base64"))?;
            reader(&attributes, &data)
        }
        (Some(_), Some(_)) => Err(Refusal::CloudEvent("it has both data and data_base64")),
        (None, None) => Err(Refusal::Missing("data")),
    }
}

fn binary(incoming: &Incoming, reader: Reader) -> Result<Vec<Item>, Refusal> {
    let attribute = |name: &str| incoming.attributes.get(name).map(String::as_str).filter(|value| !value.is_empty());
    check_version(attribute("specversion"))?;
    let attributes = Attributes {
        id: attribute("id").map(Cow::Borrowed),
        kind: attribute("type").map(Cow::Borrowed),
        time: attribute("time").map(Cow::Borrowed),
    };
    reader(&attributes, &incoming.body)
}

fn check_version(version: Option<&str>) -> Result<(), Refusal> {
    match version {
        Some("1.0") => Ok(()),
        Some(_) => Err(Refusal::CloudEvent("its specversion is not 1.0")),
        None => Err(Refusal::Missing("specversion")),
    }
}

/// Reads the plain form, which is our own: what a CI job or a relay sends that no registry's form suits.
pub(super) fn plain(attributes: &Attributes<'_>, data: &[u8]) -> Result<Vec<Item>, Refusal> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Data<'a> {
        #[serde(borrow, default)]
        repository: Text<'a>,
        #[serde(borrow, default)]
        tag: Text<'a>,
        #[serde(borrow, default)]
        digest: Text<'a>,
        #[serde(borrow, default)]
        media_type: Text<'a>,
        #[serde(borrow)]
        actor: Option<&'a RawValue>,
    }
    let ignored = |reason| Ok(vec![Item::Ignored(reason)]);
    if !is_push(attributes.kind.as_deref().ok_or(Refusal::Missing("type"))?) {
        return ignored(Ignored::UnknownAction);
    }
    let _: Unique = serde_json::from_slice(data).map_err(Refusal::Malformed)?;
    let push: Data<'_> = serde_json::from_slice(data).map_err(Refusal::Malformed)?;
    if let Some(reason) = push.media_type.get().and_then(unsigned_media_type) {
        return ignored(reason);
    }
    let tag: Option<Tag> = push.tag.get().map(str::parse).transpose()?;
    if tag.as_ref().is_some_and(Tag::is_attachment) {
        return ignored(Ignored::Attachment);
    }
    let actor: Text<'_> = loosely(push.actor);
    Ok(vec![Item::Push(Push {
        id: log_id(attributes.id.as_deref(), data),
        repository: push.repository.get().ok_or(Refusal::Missing("data.repository"))?.parse()?,
        tag,
        digest: push.digest.get().ok_or(Refusal::Missing("data.digest"))?.parse()?,
        pushed_at: attributes.time.as_deref().and_then(|time| time.parse().ok()),
        actor: actor.get().map(|actor| shortened(actor).to_owned()),
    })])
}

/// `com.example.registry.image.pushed`, with or without a version behind it: `io.countersign.image.pushed.v1`.
fn is_push(kind: &str) -> bool {
    let versioned = |last: &str| last.strip_prefix('v').is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
    let kind = kind.rsplit_once('.').filter(|(_, last)| versioned(last)).map_or(kind, |(kind, _)| kind);
    kind == "image.pushed" || kind.ends_with(".image.pushed")
}

#[cfg(test)]
mod tests;
