//! What stands among an image's referrers: the index, the manifests, the bundles. What was read is added to and must be readable again.
#![no_main]

use countersign::{
    oci::media_type,
    registry::ReferrersIndex,
    signature::{bundle, referrer::ReferrerManifest},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(claim) = bundle::read(data) {
        assert!(!claim.digests.is_empty(), "a bundle about nothing");
    }
    let _ = ReferrerManifest::read(media_type::OCI_MANIFEST, data);
    if let Ok(index) = ReferrersIndex::read(media_type::OCI_INDEX, data) {
        let mut merged = ReferrersIndex::empty();
        for entry in index.entries() {
            merged.add(entry).expect("no input is that long");
        }
        let bytes = merged.to_bytes().expect("no input is that large");
        let again = ReferrersIndex::read(media_type::OCI_INDEX, &bytes).expect("what we write, we read");
        for entry in index.entries() {
            assert!(again.contains(&entry.digest), "a referrer was lost in writing");
        }
        let bytes = index.to_bytes().expect("no input is that large");
        let same = ReferrersIndex::read(media_type::OCI_INDEX, &bytes).expect("what we read, we write");
        assert_eq!(same.entries(), index.entries());
    }
});
