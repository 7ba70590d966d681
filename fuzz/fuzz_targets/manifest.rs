//! Manifests as a registry serves them: telling images from what is attached to images.
#![no_main]

use countersign::{oci::media_type, subject::Content};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for media_type in [media_type::OCI_MANIFEST, media_type::OCI_INDEX] {
        if let Ok(content) = Content::parse(media_type, data) {
            let _ = content.is_attachment();
        }
    }
});
