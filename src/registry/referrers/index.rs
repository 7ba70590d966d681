//! The index of a manifest's referrers: what the API answers, and what is kept under the fallback tag where there is none.

use bytes::Bytes;

use crate::{
    oci::{
        Descriptor, Digest,
        document::{self, Document, MAX_ENTRIES},
        media_type,
    },
    registry::Manifest,
};

/// Referrers of one manifest, with everything in it that others wrote.
#[derive(Debug, Clone)]
pub struct ReferrersIndex {
    document: Document,
    /// Those of its entries that can be read.
    entries: Vec<Descriptor>,
}

/// Why content cannot be added to. It is never overwritten.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    #[error("it is not an index that can be read: {0}")]
    Malformed(String),
    #[error("it is {0}, not an image index")]
    NotAnIndex(String),
    #[error("it lists {0} referrers, and no more than {MAX_ENTRIES} are read")]
    Full(usize),
    #[error("it would have {0} bytes with a further referrer, and nobody reads more than {limit}", limit = Manifest::LIMIT)]
    TooLarge(usize),
}

impl ReferrersIndex {
    /// One without entries.
    #[must_use]
    pub fn empty() -> Self {
        Self { document: Document::empty(media_type::OCI_INDEX, "manifests"), entries: vec![] }
    }

    /// Entries that are no descriptors are kept and not looked at.
    pub fn read(media_type: &str, content: &[u8]) -> Result<Self, IndexError> {
        if media_type != media_type::OCI_INDEX {
            return Err(IndexError::NotAnIndex(media_type.escape_debug().to_string()));
        }
        let document =
            Document::read(content, "manifests").map_err(|error: document::Error| IndexError::Malformed(error.to_string()))?;
        let entries = document.entries().iter().filter_map(|entry| serde_json::from_str(entry.get()).ok()).collect();
        Ok(Self { document, entries })
    }

    /// As claimed by whoever wrote it.
    pub fn entries(&self) -> &[Descriptor] {
        &self.entries
    }

    #[must_use]
    pub fn into_entries(self) -> Vec<Descriptor> {
        self.entries
    }

    #[must_use]
    pub fn contains(&self, digest: &Digest) -> bool {
        self.entries.iter().any(|entry| entry.digest == *digest)
    }

    /// Adds a referrer that is not in it yet. All that others wrote stays, unknown members included.
    pub fn add(&mut self, entry: &Descriptor) -> Result<(), IndexError> {
        if self.contains(&entry.digest) {
            return Ok(());
        }
        let count = self.document.entries().len();
        if count >= MAX_ENTRIES {
            return Err(IndexError::Full(count));
        }
        self.document.push(entry);
        self.entries.push(entry.clone());
        Ok(())
    }

    /// The bytes to store, of the type [`media_type::OCI_INDEX`].
    ///
    /// # Errors
    /// When they are more than anybody reads: storing them would hide the referrers that are there.
    pub fn to_bytes(&self) -> Result<Bytes, IndexError> {
        let content = self.document.to_bytes();
        if content.len() > Manifest::LIMIT { Err(IndexError::TooLarge(content.len())) } else { Ok(content) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn entry(name: &str) -> Descriptor {
        serde_json::from_value(json!({ "mediaType": media_type::OCI_MANIFEST, "digest": Digest::of(name.as_bytes()), "size": 7 }))
            .unwrap()
    }

    #[test]
    fn annotations_that_are_null_are_none() {
        let mut theirs = serde_json::to_value(entry("theirs")).unwrap();
        theirs["annotations"] = Value::Null;
        theirs["artifactType"] = Value::Null;
        let content = json!({ "schemaVersion": 2, "manifests": [theirs] }).to_string();
        let index = ReferrersIndex::read(media_type::OCI_INDEX, content.as_bytes()).unwrap();
        assert_eq!(index.entries(), [entry("theirs")]);
    }

    #[test]
    fn what_others_wrote_survives_an_addition_as_text() {
        let theirs = format!(
            r#"{{"schemaVersion":2,"of":{{"theirs" :1e400}},"manifests":[{{"digest":"{}","size":1,"mediaType":"a/b","x":[ ]}},"odd"]}}"#,
            Digest::of(b"theirs")
        );
        let mut index = ReferrersIndex::read(media_type::OCI_INDEX, theirs.as_bytes()).unwrap();
        assert_eq!(index.entries().len(), 1);
        for _ in 0..2 {
            index.add(&entry("ours")).unwrap();
        }
        let bytes = index.to_bytes().unwrap();
        let text = std::str::from_utf8(&bytes).unwrap();
        for kept in [r#""of":{"theirs" :1e400}"#, r#""mediaType":"a/b","x":[ ]}"#, r#""odd""#] {
            assert!(text.contains(kept), "{text}");
        }
        let again = ReferrersIndex::read(media_type::OCI_INDEX, &bytes).unwrap();
        assert_eq!(again.entries().len(), 2);
        assert!(again.contains(&Digest::of(b"ours")));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(names: BTreeSet<String>, artifact_type: Option<String>, annotations: BTreeMap<String, String>) {
            let with = |name: &String| Descriptor {
                artifact_type: artifact_type.clone(),
                annotations: annotations.clone(),
                ..entry(name)
            };
            let entries: Vec<_> = names.iter().map(with).collect();
            let mut written = ReferrersIndex::empty();
            for one in entries.iter().chain(&entries) {
                written.add(one).unwrap();
            }
            let read = ReferrersIndex::read(media_type::OCI_INDEX, &written.to_bytes().unwrap()).unwrap();
            prop_assert_eq!(read.entries(), &entries);
        }
    }

    #[test]
    fn a_new_index_is_the_vectors() {
        let path = format!("{}/tests/data/vectors/B-rsa-pkcs1/referrers-index.json", env!("CARGO_MANIFEST_DIR"));
        let expected: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let mut index = ReferrersIndex::empty();
        index.add(&serde_json::from_value(expected["manifests"][0].clone()).unwrap()).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&index.to_bytes().unwrap()).unwrap(), expected);
    }

    #[test]
    fn what_is_no_index_is_never_added_to() {
        for (media_type, content) in [
            (media_type::OCI_MANIFEST, r#"{"layers":[]}"#),
            (media_type::DOCKER_MANIFEST_LIST, r#"{"manifests":[]}"#),
            (media_type::OCI_INDEX, "not json"),
            (media_type::OCI_INDEX, "{}"),
            (media_type::OCI_INDEX, r#"{"manifests":{}}"#),
        ] {
            assert!(ReferrersIndex::read(media_type, content.as_bytes()).is_err(), "{content}");
        }
        let full = format!(r#"{{"manifests":[{}]}}"#, vec!["0"; MAX_ENTRIES].join(","));
        let mut full = ReferrersIndex::read(media_type::OCI_INDEX, full.as_bytes()).unwrap();
        assert!(matches!(full.add(&entry("ours")), Err(IndexError::Full(MAX_ENTRIES))));
        let large = json!({ "manifests": [], "x": "x".repeat(Manifest::LIMIT) }).to_string();
        let large = ReferrersIndex::read(media_type::OCI_INDEX, large.as_bytes()).unwrap();
        assert!(matches!(large.to_bytes(), Err(IndexError::TooLarge(_))));
    }

    #[test]
    fn a_list_that_was_never_made_is_an_empty_one() {
        assert!(ReferrersIndex::read(media_type::OCI_INDEX, br#"{"manifests":null}"#).unwrap().entries().is_empty());
    }
}
