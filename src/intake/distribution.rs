//! What distribution (the Docker registry, 2.8 and 3.x) sends: an envelope of events.
//!
//! `application/vnd.docker.distribution.events.v1+json` from 2.x and `…v2+json` from 3.x have the same members, so the
//! content type is not asked. Both send one event an envelope; the format allows many, and a relay may send them.
//!
//! Everything in it can be chosen by whoever holds the token, and the hosts by anybody who may push, so no host is read.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{
    cloudevents::{Attributes, Item},
    entry::{Entry, Ignored, MOST_EVENTS, Parsed, Push, Refusal, log_id, shortened, unsigned_media_type},
    json::{Key, Members, Text, Unique, loosely},
};
use crate::attachment;
use crate::oci::{Tag, media_type};

/// How the user agent of our own writes begins.
const OWN_AGENT: &str = "countersign/";

/// Reads a notification. Pure, and linear in the length of `body`, which the caller has bounded.
///
/// Unknown members are ignored, numbers are not read, and `""`, `0`, `null` and nothing are the same, as the versions
/// differ in these. One bad event does not spoil its neighbours.
pub fn parse(body: &[u8]) -> Parsed<'_> {
    let Envelope(entries) = serde_json::from_slice(body).map_err(Refusal::Malformed)?;
    entries.ok_or(Refusal::TooMany(MOST_EVENTS))
}

/// The envelope as the data of a CloudEvent.
pub(super) fn within(_: &Attributes<'_>, data: &[u8]) -> Result<Vec<Item>, Refusal> {
    let item = |entry| match entry {
        Entry::Push(push) => Item::Push(push),
        Entry::Ignored(reason) => Item::Ignored(reason),
        Entry::Refused { refusal, .. } => Item::Refused(refusal),
    };
    Ok(parse(data)?.into_iter().map(item).collect())
}

fn read(json: &str) -> Entry<'_> {
    match try_read(json) {
        Ok(entry) => entry,
        Err(refusal) => Entry::Refused { refusal, json },
    }
}

fn try_read(json: &str) -> Result<Entry<'_>, Refusal> {
    let _: Unique = serde_json::from_str(json).map_err(Refusal::Malformed)?;
    let event: Event<'_> = serde_json::from_str(json).map_err(Refusal::Malformed)?;
    let ignored = |reason| Ok(Entry::Ignored(reason));
    match event.action.get().ok_or(Refusal::Missing("action"))? {
        "push" => {}
        "pull" => return ignored(Ignored::Pull),
        "delete" => return ignored(Ignored::Delete),
        "mount" => return ignored(Ignored::Mount),
        _ => return ignored(Ignored::UnknownAction),
    }
    let target = event.target.ok_or(Refusal::Missing("target"))?;
    if let Some(reason) = unsigned_media_type(target.media_type.get().ok_or(Refusal::Missing("target.mediaType"))?) {
        return ignored(reason);
    }
    let repository = target.repository.get().ok_or(Refusal::Missing("target.repository"))?.parse()?;
    let digest = target.digest.get().ok_or(Refusal::Missing("target.digest"))?.parse()?;
    let tag: Option<Tag> = target.tag.get().map(str::parse).transpose()?;
    if tag.as_ref().is_some_and(Tag::is_attachment) || target.shows_an_attachment() {
        return ignored(Ignored::Attachment);
    }
    let request: Request<'_> = loosely(event.request);
    if loosely::<Text<'_>>(request.user_agent).get().is_some_and(|agent| agent.starts_with(OWN_AGENT)) {
        return ignored(Ignored::Own);
    }
    let id: Text<'_> = loosely(event.id);
    let timestamp: Text<'_> = loosely(event.timestamp);
    let actor: Actor<'_> = loosely(event.actor);
    let actor: Text<'_> = loosely(actor.name);
    Ok(Entry::Push(Push {
        id: log_id(id.get(), json.as_bytes()),
        repository,
        tag,
        digest,
        pushed_at: timestamp.get().and_then(|timestamp| timestamp.parse().ok()),
        actor: actor.get().map(|actor| shortened(actor).to_owned()),
    }))
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    timestamp: Option<&'a RawValue>,
    #[serde(borrow, default)]
    action: Text<'a>,
    #[serde(borrow)]
    target: Option<Target<'a>>,
    #[serde(borrow)]
    request: Option<&'a RawValue>,
    #[serde(borrow)]
    actor: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Target<'a> {
    #[serde(borrow, default)]
    media_type: Text<'a>,
    #[serde(borrow, default)]
    repository: Text<'a>,
    #[serde(borrow, default)]
    digest: Text<'a>,
    #[serde(borrow, default)]
    tag: Text<'a>,
    #[serde(borrow)]
    references: Option<&'a RawValue>,
}

impl Target<'_> {
    /// Whether the references (sent with `includereferences: true`) suffice to say so. Of an image manifest they are the
    /// config and then the layers; the children of an index say nothing of the kind.
    fn shows_an_attachment(&self) -> bool {
        if self.media_type.get().is_none_or(media_type::is_index) {
            return false;
        }
        let References { config, layers, others } = loosely(self.references);
        config || (layers > 0 && others == 0)
    }
}

#[derive(Deserialize, Default)]
struct Request<'a> {
    #[serde(borrow, rename = "useragent")]
    user_agent: Option<&'a RawValue>,
}

#[derive(Deserialize, Default)]
struct Actor<'a> {
    #[serde(borrow)]
    name: Option<&'a RawValue>,
}

/// The references of an image manifest, summed up as they are read.
#[derive(Default)]
struct References {
    /// The config is that of an attachment.
    config: bool,
    /// Layers of attachments.
    layers: usize,
    /// Layers of anything else.
    others: usize,
}

impl<'de> Deserialize<'de> for References {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Descriptor<'a> {
            #[serde(borrow, default)]
            media_type: Text<'a>,
        }
        struct ReferencesVisitor;
        impl<'de> Visitor<'de> for ReferencesVisitor {
            type Value = References;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of descriptors")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<References, A::Error> {
                let mut references = References::default();
                let Some(config) = seq.next_element::<Descriptor<'_>>()? else { return Ok(references) };
                references.config = config.media_type.get().is_some_and(attachment::is_config);
                while let Some(layer) = seq.next_element::<Descriptor<'_>>()? {
                    if layer.media_type.get().is_some_and(attachment::is_layer) {
                        references.layers += 1;
                    } else {
                        references.others += 1;
                    }
                }
                Ok(references)
            }
        }
        deserializer.deserialize_seq(ReferencesVisitor)
    }
}

/// The outer object; `None` if it holds more than [`MOST_EVENTS`].
struct Envelope<'a>(Option<Vec<Entry<'a>>>);

impl<'de: 'a, 'a> Deserialize<'de> for Envelope<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EnvelopeVisitor;
        impl<'de> Visitor<'de> for EnvelopeVisitor {
            type Value = Envelope<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an envelope of events")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Members::default();
                let mut envelope = Envelope(Some(Vec::new()));
                let (mut has_events, mut has_others) = (false, false);
                while let Some(key) = map.next_key::<Key<'de>>()? {
                    if key.0 == "events" {
                        has_events = true;
                        envelope =
                            map.next_value::<Option<Events<'de>>>()?.map_or(Envelope(Some(Vec::new())), |Events(e)| Envelope(e));
                    } else {
                        has_others = true;
                        map.next_value::<Unique>()?;
                    }
                    members.add(key)?;
                }
                // `{}` is an envelope of nothing; what has members and no events is something else.
                if has_others && !has_events {
                    return Err(de::Error::missing_field("events"));
                }
                Ok(envelope)
            }
        }
        deserializer.deserialize_map(EnvelopeVisitor)
    }
}

struct Events<'a>(Option<Vec<Entry<'a>>>);

impl<'de: 'a, 'a> Deserialize<'de> for Events<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EventsVisitor;
        impl<'de> Visitor<'de> for EventsVisitor {
            type Value = Events<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of events")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut entries = Some(Vec::new());
                while let Some(json) = seq.next_element::<&RawValue>()? {
                    if let Some(kept) = entries.as_mut().filter(|kept| kept.len() < MOST_EVENTS) {
                        kept.push(read(json.get()));
                    } else {
                        entries = None;
                    }
                }
                Ok(Events(entries))
            }
        }
        deserializer.deserialize_seq(EventsVisitor)
    }
}

#[cfg(test)]
pub(super) mod tests;
