//! What stands under a `.sig` tag, and the payloads in it. What was read is added to, and taken along as it is, and must be readable
//! again.
#![no_main]

use countersign::{
    oci::media_type,
    signature::cosign::{SignatureManifest, Statement, extend_config},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = Statement::read(data);
    let _ = extend_config(data, &[]);
    if let Ok(manifest) = SignatureManifest::read(media_type::OCI_MANIFEST, data) {
        let mut merged = SignatureManifest::empty();
        if merged.add(manifest.layers().iter().cloned()).is_ok() {
            let bytes = merged.to_bytes().expect("no input is that large");
            let again = SignatureManifest::read(media_type::OCI_MANIFEST, &bytes).expect("what we write, we read");
            for layer in manifest.layers() {
                assert!(again.contains(layer), "a signature was lost in writing");
            }
        }
        let entries: Vec<_> = manifest.entries().collect();
        let mut copy = SignatureManifest::empty();
        if copy.add_entries(&entries).is_ok() {
            let bytes = copy.to_bytes().expect("no input is that large");
            let copied = SignatureManifest::read(media_type::OCI_MANIFEST, &bytes).expect("what we copy, we read");
            for layer in manifest.layers() {
                assert!(copied.contains(layer), "a signature was lost in copying");
            }
        }
        let bytes = manifest.to_bytes().expect("no input is that large");
        let same = SignatureManifest::read(media_type::OCI_MANIFEST, &bytes).expect("what we read, we write");
        assert_eq!(same.layers(), manifest.layers());
    }
});
