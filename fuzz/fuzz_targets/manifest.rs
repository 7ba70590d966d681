//! Manifests as a registry serves them: what they are taken for, and telling images from what is attached to images.
#![no_main]

use countersign::{oci::media_type, registry::read_manifest, subject::Content};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

const HEADERS: [Option<&str>; 5] = [
    None,
    Some(media_type::OCI_MANIFEST),
    Some(media_type::OCI_INDEX),
    Some(media_type::DOCKER_MANIFEST),
    Some(media_type::DOCKER_MANIFEST_LIST),
];

fuzz_target!(|data: &[u8]| {
    for media_type in [media_type::OCI_MANIFEST, media_type::OCI_INDEX] {
        if let Ok(content) = Content::parse(media_type, data) {
            let _ = content.is_attachment();
        }
    }
    let taken_for: Vec<_> = HEADERS.into_iter().filter_map(|header| read_manifest(header, data)).collect();
    let Some(first) = taken_for.first() else { return };
    // CVE-2021-41190: whatever it is served as, no two readers see an image and an index in it.
    let is_index = media_type::is_index(first);
    assert!(taken_for.iter().all(|other| media_type::is_index(other) == is_index), "taken for {taken_for:?}");
    // What nobody looks at may have been passed over: text that is no UTF-8, numbers of any size.
    let Ok(content) = serde_json::from_slice::<Value>(data) else { return };
    let others = if is_index { &["layers", "config", "fsLayers"][..] } else { &["manifests", "fsLayers"] };
    assert!(others.iter().all(|member| content[member].is_null()), "taken for {first}");
    if let Some(named) = content["mediaType"].as_str() {
        assert!(taken_for.iter().all(|taken| taken.eq_ignore_ascii_case(named)), "taken for {taken_for:?}");
    }
});
