//! What a registry says beside manifests: the challenge and the link in its headers, and its error documents. The first line is the header.
#![no_main]

use countersign::registry::read_answer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (header, body) = data.split_at(data.iter().position(|&byte| byte == b'\n').unwrap_or(data.len()));
    read_answer(&String::from_utf8_lossy(header), body.get(1..).unwrap_or_default());
});
