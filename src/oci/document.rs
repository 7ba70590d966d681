//! A manifest to which entries are added, with everything in it that others wrote.
//!
//! What is not looked at stays text, so that it is written back as it was, and reading takes about as much memory as the
//! text. The `.sig` manifest is one, whose `layers` grow, and a referrers index, whose `manifests` do.

use std::{fmt, marker::PhantomData};

use bytes::Bytes;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, SeqAccess, Visitor},
    ser::SerializeMap,
};
use serde_json::value::RawValue;

/// What is read of a list: what is looked for may stand among too many.
pub(crate) const MAX_ENTRIES: usize = 10_000;
/// Members of an object here; OCI has eight.
pub(crate) const MAX_MEMBERS: usize = 64;

/// An object of JSON with one list that grows.
#[derive(Debug, Clone)]
pub(crate) struct Document {
    /// All but the list.
    members: Members,
    list: &'static str,
    entries: Vec<Box<RawValue>>,
}

/// Why content is no such document.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Malformed(#[from] serde_json::Error),
    #[error("its `{0}` are not a list")]
    NoList(&'static str),
}

impl Document {
    /// One of this media type whose list is empty.
    pub(crate) fn empty(media_type: &str, list: &'static str) -> Self {
        let mut members = Members::default();
        members.set("schemaVersion", &2);
        members.set("mediaType", &media_type);
        Self { members, list, entries: vec![] }
    }

    pub(crate) fn read(content: &[u8], list: &'static str) -> Result<Self, Error> {
        let mut members: Members = serde_json::from_slice(content)?;
        let entries = members.take(list).ok_or(Error::NoList(list))?;
        let entries = match entries.get() {
            // Go writes this for a list that was never made.
            "null" => vec![],
            text if text.starts_with('[') => serde_json::from_str::<Bounded<Box<RawValue>>>(text)?.0,
            _ => return Err(Error::NoList(list)),
        };
        Ok(Self { members, list, entries })
    }

    /// The list's entries, as they were written.
    pub(crate) fn entries(&self) -> &[Box<RawValue>] {
        &self.entries
    }

    pub(crate) fn push(&mut self, entry: &impl Serialize) {
        self.entries.push(raw(entry));
    }

    pub(crate) fn get(&self, member: &str) -> Option<&RawValue> {
        self.members.get(member)
    }

    pub(crate) fn set(&mut self, member: &str, value: &impl Serialize) {
        self.members.set(member, value);
    }

    /// As it is stored.
    pub(crate) fn to_bytes(&self) -> Bytes {
        serde_json::to_vec(self).expect("texts of JSON are JSON").into()
    }
}

impl Serialize for Document {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.members.0.len() + 1))?;
        for (name, value) in &self.members.0 {
            map.serialize_entry(name, value)?;
        }
        map.serialize_entry(self.list, &self.entries)?;
        map.end()
    }
}

/// An object's members as they were read, in order. Of equal names the last counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Members(Vec<(String, Box<RawValue>)>);

impl Members {
    fn get(&self, name: &str) -> Option<&RawValue> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| &**value)
    }

    fn take(&mut self, name: &str) -> Option<Box<RawValue>> {
        let at = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.remove(at).1)
    }

    pub(crate) fn set(&mut self, name: &str, value: &impl Serialize) {
        self.put(name.to_owned(), raw(value));
    }

    fn put(&mut self, name: String, value: Box<RawValue>) {
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = value,
            None => self.0.push((name, value)),
        }
    }
}

fn raw(value: &impl Serialize) -> Box<RawValue> {
    serde_json::value::to_raw_value(value).expect("what is set here always serialises")
}

impl Serialize for Members {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Members;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Members::default();
                while let Some((name, value)) = map.next_entry()? {
                    members.put(name, value);
                    if members.0.len() > MAX_MEMBERS {
                        return Err(de::Error::custom(format_args!("an object here has no more than {MAX_MEMBERS} members")));
                    }
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(Reader)
    }
}

/// A list that is given up when it is absurdly long, before it has taken the memory.
struct Bounded<T>(Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Bounded<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Reader<T> {
            type Value = Bounded<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Bounded<T>, A::Error> {
                let mut items = vec![];
                while let Some(item) = list.next_element()? {
                    items.push(item);
                    if items.len() > MAX_ENTRIES {
                        return Err(de::Error::custom(format_args!("more than {MAX_ENTRIES} entries are not read")));
                    }
                }
                Ok(Bounded(items))
            }
        }
        deserializer.deserialize_seq(Reader(PhantomData))
    }
}
