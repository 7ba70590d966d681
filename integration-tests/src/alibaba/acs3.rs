//! `ACS3-HMAC-SHA256`, as its documentation has it.

use std::collections::BTreeMap;

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

/// A `POST /` without a body, signed as the documentation has it.
pub(super) struct Signing {
    pub(super) signature: String,
    pub(super) to_sign: String,
    pub(super) canonical: String,
}

/// `headers` are those that are signed, sorted, their names in lower case.
pub(super) fn acs3(secret: &str, parameters: &BTreeMap<String, String>, headers: &[(&str, String)]) -> Signing {
    let names: Vec<_> = headers.iter().map(|(name, _)| *name).collect();
    let lines: Vec<_> = headers.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
    let canonical = format!("POST\n/\n{}\n{}\n{}\n{}", query(parameters), lines.concat(), names.join(";"), hash(b""));
    let to_sign = format!("ACS3-HMAC-SHA256\n{}", hash(canonical.as_bytes()));
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("a secret of any length will do");
    mac.update(to_sign.as_bytes());
    Signing { signature: hex::encode(mac.finalize().into_bytes()), to_sign, canonical }
}

pub(super) fn query(parameters: &BTreeMap<String, String>) -> String {
    let pairs: Vec<_> = parameters.iter().map(|(name, value)| format!("{}={}", escape(name), escape(value))).collect();
    pairs.join("&")
}

pub(super) fn hash(text: &[u8]) -> String {
    hex::encode(Sha256::digest(text))
}

fn escape(text: &str) -> String {
    let kept = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    let one = |byte: u8| if kept(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(one).collect()
}
