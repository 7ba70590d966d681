//! Configuration files: whatever stands in one, the answer is a configuration or its problems in full.
#![no_main]

use std::path::Path;

use countersign::config::{Config, in_full};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        match Config::parse(text, Path::new("/nonexistent/fuzz.toml")) {
            Ok((_, warnings)) => drop(in_full(&warnings)),
            Err(problems) => drop(problems.to_string()),
        }
    }
});
