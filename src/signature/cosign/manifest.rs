//! The manifest under the `.sig` tag: read within bounds, added to, and written back with all that others put there.

use std::{borrow::Cow, fmt, marker::PhantomData};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, SeqAccess, Visitor},
    ser::SerializeMap,
};
use serde_json::{json, value::RawValue};

use super::{EMPTY_CONFIG, LAYER_MEDIA_TYPE, Layer, SIGNATURE_ANNOTATION};
use crate::{
    oci::{Digest, media_type},
    registry::Manifest,
};

/// cosign reads no more layers than these, so a further signature would be invisible.
const MAX_LAYERS: usize = 1000;
/// What is read all the same: a signature of ours may stand among too many.
const MAX_LAYERS_READ: usize = 10 * MAX_LAYERS;
/// Members of an object here; OCI has eight.
const MAX_MEMBERS: usize = 64;

/// Why what the `.sig` tag points to cannot be added to. It is never overwritten.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("it is not a manifest that can be read")]
    Malformed(#[from] serde_json::Error),
    #[error("it is {0}, not an image manifest")]
    NotAManifest(String),
    #[error("its `layers` are not a list")]
    NoLayers,
    #[error("it holds {0} signatures, and verifiers read no more than {MAX_LAYERS}")]
    Full(usize),
    #[error("it would have {0} bytes with a further signature, and nobody reads more than {limit}", limit = Manifest::LIMIT)]
    TooLarge(usize),
}

/// The manifest under the `.sig` tag, with everything in it that others wrote.
///
/// What is not looked at stays text, so that it is written back as it was, and reading takes about as much memory as the text.
#[derive(Debug, Clone)]
pub struct SignatureManifest {
    /// All but the layers.
    members: Members,
    descriptors: Vec<Box<RawValue>>,
    /// Those of the descriptors that are signatures.
    layers: Vec<Layer>,
}

impl SignatureManifest {
    /// One without signatures yet, with the constant config.
    #[must_use]
    pub fn empty() -> Self {
        let config = json!({
            "mediaType": media_type::OCI_CONFIG,
            "size": EMPTY_CONFIG.len(),
            "digest": Digest::of(EMPTY_CONFIG),
        });
        let mut members = Members::default();
        members.set("schemaVersion", &2);
        members.set("mediaType", &media_type::OCI_MANIFEST);
        members.set("config", &config);
        Self { members, descriptors: vec![], layers: vec![] }
    }

    /// Reads what a registry serves under the tag. Layers that are no signatures are kept and not looked at.
    pub fn read(media_type: &str, content: &[u8]) -> Result<Self, Error> {
        if !matches!(media_type, media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST) {
            return Err(Error::NotAManifest(media_type.escape_debug().to_string()));
        }
        let mut members: Members = serde_json::from_slice(content)?;
        let layers = members.take("layers").ok_or(Error::NoLayers)?;
        if !layers.get().starts_with('[') {
            return Err(Error::NoLayers);
        }
        let Bounded(descriptors) = serde_json::from_str::<Bounded<Box<RawValue>>>(layers.get())?;
        let layers = descriptors.iter().filter_map(|descriptor| Layer::from_descriptor(descriptor)).collect();
        Ok(Self { members, descriptors, layers })
    }

    /// The signatures in it, as claimed: nothing here has been verified.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Whether it holds exactly this signature.
    #[must_use]
    pub fn contains(&self, layer: &Layer) -> bool {
        self.layers.contains(layer)
    }

    /// Adds signatures that are not in it yet. All that others wrote stays, unknown members included.
    pub fn add(&mut self, layers: impl IntoIterator<Item = Layer>) -> Result<(), Error> {
        // containers/image takes OCI manifests only, so one that another tool wrote with Docker's type is rewritten.
        self.members.set("mediaType", &media_type::OCI_MANIFEST);
        for layer in layers {
            if self.contains(&layer) {
                continue;
            }
            if self.descriptors.len() >= MAX_LAYERS {
                return Err(Error::Full(self.descriptors.len()));
            }
            self.descriptors.push(layer.to_descriptor());
            self.layers.push(layer);
        }
        Ok(())
    }

    /// The config's blob, if it is not the constant one and so lists the layers: adding one must extend it.
    #[must_use]
    pub fn own_config(&self) -> Option<Digest> {
        #[derive(Deserialize)]
        struct Config {
            digest: Digest,
        }
        let config: Config = serde_json::from_str(self.members.get("config")?.get()).ok()?;
        (config.digest != Digest::of(EMPTY_CONFIG)).then_some(config.digest)
    }

    /// Points the manifest at a config that [`super::extend_config`] made.
    pub fn set_config(&mut self, content: &[u8]) {
        let config = self.members.get("config").and_then(|config| serde_json::from_str::<Members>(config.get()).ok());
        if let Some(mut config) = config {
            config.set("digest", &Digest::of(content));
            config.set("size", &content.len());
            self.members.set("config", &config);
        }
    }

    /// The bytes to store, and their media type is always [`media_type::OCI_MANIFEST`].
    ///
    /// # Errors
    /// When they are more than anybody reads: storing them would hide the signatures that are there.
    pub fn to_bytes(&self) -> Result<Bytes, Error> {
        let content = serde_json::to_vec(self).expect("texts of JSON are JSON");
        if content.len() > Manifest::LIMIT { Err(Error::TooLarge(content.len())) } else { Ok(content.into()) }
    }
}

impl Serialize for SignatureManifest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.members.0.len() + 1))?;
        for (name, value) in &self.members.0 {
            map.serialize_entry(name, value)?;
        }
        map.serialize_entry("layers", &self.descriptors)?;
        map.end()
    }
}

impl Layer {
    fn to_descriptor(&self) -> Box<RawValue> {
        raw(&json!({
            "mediaType": LAYER_MEDIA_TYPE,
            "size": self.size,
            "digest": self.payload,
            "annotations": { SIGNATURE_ANNOTATION: BASE64_STANDARD.encode(&self.signature) },
        }))
    }

    fn from_descriptor(descriptor: &RawValue) -> Option<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Descriptor<'a> {
            #[serde(borrow)]
            media_type: Cow<'a, str>,
            digest: Digest,
            size: u64,
            #[serde(borrow)]
            annotations: Annotations<'a>,
        }
        // Its name is `SIGNATURE_ANNOTATION`.
        #[derive(Deserialize)]
        struct Annotations<'a> {
            #[serde(borrow, rename = "dev.cosignproject.cosign/signature")]
            signature: Cow<'a, str>,
        }
        let descriptor: Descriptor<'_> = serde_json::from_str(descriptor.get()).ok()?;
        if descriptor.media_type != LAYER_MEDIA_TYPE {
            return None;
        }
        let signature = BASE64_STANDARD.decode(descriptor.annotations.signature.as_bytes()).ok()?;
        Some(Self { payload: descriptor.digest, size: descriptor.size, signature })
    }
}

/// An object's members as they were read, in order. Of equal names the last counts.
#[derive(Debug, Clone, Default)]
struct Members(Vec<(String, Box<RawValue>)>);

impl Members {
    fn get(&self, name: &str) -> Option<&RawValue> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| &**value)
    }

    fn take(&mut self, name: &str) -> Option<Box<RawValue>> {
        let at = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.remove(at).1)
    }

    fn set(&mut self, name: &str, value: &impl Serialize) {
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
                    if items.len() > MAX_LAYERS_READ {
                        return Err(de::Error::custom(format_args!("more than {MAX_LAYERS_READ} layers are not read")));
                    }
                }
                Ok(Bounded(items))
            }
        }
        deserializer.deserialize_seq(Reader(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::{
        kms::RawSignature,
        signature::cosign::{extend_config, tests::*},
    };

    #[test]
    fn the_layer_is_the_vectors_and_the_config_is_the_constant_one() {
        let written: Value = serde_json::from_slice(&vector("A-rsa-pkcs1", "manifest.json")).unwrap();
        let mut manifest = SignatureManifest::empty();
        manifest.add([prepared(REFERENCE).assemble(&signature("A-rsa-pkcs1"))]).unwrap();
        let ours: Value = serde_json::from_slice(&manifest.to_bytes().unwrap()).unwrap();
        assert_eq!(ours["layers"], written["layers"]);
        assert_eq!(ours["mediaType"], written["mediaType"]);
        assert_eq!(ours["config"]["digest"], "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a");
        assert_eq!(manifest.own_config(), None);
    }

    #[test]
    fn what_others_wrote_survives_an_addition() {
        let theirs = vector("A-two-tags-rsa-pkcs1", "manifest.json");
        let mut document: Value = serde_json::from_slice(&theirs).unwrap();
        document["annotations"] = json!({ "kept": "yes" });
        document["layers"][0]["annotations"]["of/another"] = json!("kept");
        document["layers"].as_array_mut().unwrap().push(json!({ "mediaType": "application/x-unknown", "odd": [1, 2] }));
        let mut manifest = SignatureManifest::read(media_type::DOCKER_MANIFEST, document.to_string().as_bytes()).unwrap();
        assert_eq!(manifest.layers().len(), 2);
        manifest.add([prepared(REFERENCE).assemble(&RawSignature(vec![1, 2, 3]))]).unwrap();
        let after: Value = serde_json::from_slice(&manifest.to_bytes().unwrap()).unwrap();
        assert_eq!(after["annotations"], document["annotations"]);
        assert_eq!(after["layers"].as_array().unwrap()[..3], document["layers"].as_array().unwrap()[..3]);
        assert_eq!(after["layers"].as_array().unwrap().len(), 4);
        assert_eq!(after["mediaType"], media_type::OCI_MANIFEST);
    }

    #[test]
    fn adding_twice_adds_once() {
        let layer = prepared(REFERENCE).assemble(&signature("A-rsa-pkcs1"));
        let mut manifest = SignatureManifest::empty();
        manifest.add([layer.clone(), layer.clone()]).unwrap();
        manifest.add([layer]).unwrap();
        assert_eq!(manifest.layers().len(), 1);
    }

    #[test]
    fn a_config_that_lists_layers_is_extended_as_cosign_does() {
        let manifest = SignatureManifest::read(media_type::OCI_MANIFEST, &vector("A-rsa-pkcs1", "manifest.json")).unwrap();
        let config = vector("A-rsa-pkcs1", "config.json");
        assert_eq!(manifest.own_config(), Some(Digest::of(&config)));
        let layer = prepared(REFERENCE).assemble(&signature("A-rsa-pkcs1"));
        let extended: Value = serde_json::from_slice(&extend_config(&config, std::slice::from_ref(&layer)).unwrap()).unwrap();
        assert_eq!(extended["rootfs"]["diff_ids"].as_array().unwrap().len(), 2);
        assert_eq!(extended["rootfs"]["diff_ids"][1], json!(layer.payload()));
        assert_eq!(extended["history"].as_array().unwrap().len(), 2);
        assert_eq!(extend_config(b"{}", &[layer]), None);
    }

    #[test]
    fn what_is_no_signature_manifest_is_never_added_to() {
        for (media_type, content) in [
            (media_type::OCI_INDEX, r#"{"manifests":[]}"#),
            (media_type::OCI_MANIFEST, "not json"),
            (media_type::OCI_MANIFEST, "[]"),
            (media_type::OCI_MANIFEST, r#"{"layers":{}}"#),
            (media_type::OCI_MANIFEST, "{}"),
        ] {
            assert!(SignatureManifest::read(media_type, content.as_bytes()).is_err(), "{content}");
        }
        let full: Vec<Value> = (0..MAX_LAYERS).map(|_| json!({})).collect();
        let full = json!({ "layers": full }).to_string();
        let mut manifest = SignatureManifest::read(media_type::OCI_MANIFEST, full.as_bytes()).unwrap();
        let layer = prepared(REFERENCE).assemble(&RawSignature(vec![1]));
        assert!(matches!(manifest.add([layer]), Err(Error::Full(MAX_LAYERS))));
    }

    #[test]
    fn what_is_absurdly_large_in_number_is_given_up() {
        let read = |content: String| SignatureManifest::read(media_type::OCI_MANIFEST, content.as_bytes());
        let layers = |count: usize| format!(r#"{{"layers":[{}]}}"#, vec!["0"; count].join(","));
        assert!(read(layers(MAX_LAYERS_READ)).is_ok());
        assert!(matches!(read(layers(MAX_LAYERS_READ + 1)), Err(Error::Malformed(why)) if why.to_string().contains("layers")));
        let members = |count: usize| {
            let names: Vec<_> = (1..count).map(|n| format!(r#""m{n}":0,"#)).collect();
            format!(r#"{{{}"layers":[]}}"#, names.concat())
        };
        assert!(read(members(MAX_MEMBERS)).is_ok());
        assert!(read(members(MAX_MEMBERS + 1)).is_err());
    }

    #[test]
    fn text_that_is_not_looked_at_stays_as_it_was_written() {
        let odd =
            r#"{"layers":[{"size":1e400, "a" : [ ]}],"config":{"digest":"x","big":123456789012345678901234567890},"b":1.0}"#;
        let mut manifest = SignatureManifest::read(media_type::OCI_MANIFEST, odd.as_bytes()).unwrap();
        manifest.add([prepared(REFERENCE).assemble(&RawSignature(vec![1]))]).unwrap();
        let bytes = manifest.to_bytes().unwrap();
        let text = std::str::from_utf8(&bytes).unwrap();
        for kept in [r#"{"size":1e400, "a" : [ ]}"#, r#"{"digest":"x","big":123456789012345678901234567890}"#, r#""b":1.0"#] {
            assert!(text.contains(kept), "{text}");
        }
    }
}
