//! Private keys' files: PEM (RFC 7468), in the clear or encrypted with a passphrase (PKCS#8 and PBES2, RFC 8018).

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
};

use aws_lc_rs::{error::Unspecified, rand};
use rsa::pkcs8::{
    self, EncryptedPrivateKeyInfo, LineEnding, PrivateKeyInfo, SecretDocument,
    pkcs5::{
        self,
        pbes2::{EncryptionScheme, Kdf, Parameters, ScryptParams},
    },
};
use secrecy::{ExposeSecret, SecretString, zeroize::Zeroizing};

use super::misconfigured;
use crate::kms::{Error, KeyUri, public_key::pem_label};

const PLAIN: &str = "PRIVATE KEY";
const ENCRYPTED: &str = "ENCRYPTED PRIVATE KEY";

/// No key of 4096 bits comes near it, in any encoding.
const LARGEST_FILE: u64 = 64 * 1024;

// What a file may ask of us before it is known to be worth it.
const MOST_ITERATIONS: u32 = 10_000_000;
const MOST_MEMORY: u64 = 256 * 1024 * 1024;
const MOST_LANES: u16 = 16;

/// Reads a file that its owner alone can reach, and decrypts it if it is encrypted.
pub(super) fn read(path: &Path, passphrase: Option<&SecretString>) -> Result<SecretDocument, Error> {
    let failed =
        |source| Error::File { key: Arc::new(KeyUri::File(path.to_owned())), what: "the key file could not be read", source };
    // Before it is opened: opening a pipe would wait for its writer.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(misconfigured(path, "it is not a file"));
    }
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        let path_text = path.display();
        let what =
            format!("others than its owner have access to it (mode {mode:04o}), so it is not used: run `chmod 600 {path_text}`");
        return Err(misconfigured(path, what));
    }
    let mut text = Zeroizing::new(String::with_capacity(8 * 1024));
    file.take(LARGEST_FILE + 1).read_to_string(&mut text).map_err(|source| {
        if source.kind() == io::ErrorKind::InvalidData { misconfigured(path, not_pem(path)) } else { failed(source) }
    })?;
    if text.len() as u64 > LARGEST_FILE {
        return Err(misconfigured(path, "it is far too large for a key"));
    }
    let text = text.trim();
    let label = pem_label(text).ok_or_else(|| misconfigured(path, not_pem(path)))?;
    let document = || {
        let what =
            format!("what is between `-----BEGIN {label}-----` and `-----END {label}-----` is damaged, or something follows it");
        SecretDocument::from_pem(text).map(|(_, document)| document).map_err(|_| misconfigured(path, what))
    };
    match (label, passphrase) {
        (PLAIN, None) => document(),
        (ENCRYPTED, Some(passphrase)) => decrypt(path, &document()?, passphrase),
        (PLAIN, Some(_)) => {
            let what = format!(
                "there is a passphrase for it, and it is not encrypted: remove `passphrase` from the witness, or encrypt the key with \
                 `openssl pkcs8 -topk8 -v2 aes-256-cbc -in {} -out NEW` and `chmod 600 NEW`",
                path.display()
            );
            Err(misconfigured(path, what))
        }
        (ENCRYPTED, None) => {
            let what = "the private key is encrypted, and there is no passphrase for it: give the witness `passphrase = { file = \
                        \"/run/secrets/passphrase\" }`";
            Err(misconfigured(path, what))
        }
        (label, _) => Err(misconfigured(path, wrong_label(path, label, text))),
    }
}

fn decrypt(path: &Path, document: &SecretDocument, passphrase: &SecretString) -> Result<SecretDocument, Error> {
    let unsupported = || {
        let what = format!(
            "it is encrypted in a way that is not supported (PBES2 with PBKDF2-HMAC-SHA-2 or scrypt, and AES-CBC, is): encrypt it anew \
             with `openssl pkcs8 -topk8 -v2 aes-256-cbc -v2prf hmacWithSHA256 -in {} -out NEW` and `chmod 600 NEW`",
            path.display()
        );
        misconfigured(path, what)
    };
    let encrypted = EncryptedPrivateKeyInfo::try_from(document.as_bytes()).map_err(|_| unsupported())?;
    let scheme = encrypted.encryption_algorithm.pbes2().ok_or_else(unsupported)?;
    let is_bearable = match &scheme.kdf {
        Kdf::Pbkdf2(kdf) => kdf.iteration_count <= MOST_ITERATIONS,
        Kdf::Scrypt(kdf) => {
            let memory = kdf.cost_parameter.saturating_mul(u64::from(kdf.block_size)).saturating_mul(128);
            memory <= MOST_MEMORY && kdf.parallelization <= MOST_LANES
        }
        _ => return Err(unsupported()),
    };
    if !is_bearable {
        let what = "reading it would take too much time or memory: encrypt it with fewer iterations (at most ten million of PBKDF2, or 256 \
                    MiB of scrypt)";
        return Err(misconfigured(path, what));
    }
    encrypted.decrypt(passphrase.expose_secret()).map_err(|error| match error {
        pkcs8::Error::EncryptedPrivateKey(
            pkcs5::Error::UnsupportedAlgorithm { .. }
            | pkcs5::Error::NoPbes1CryptSupport
            | pkcs5::Error::AlgorithmParametersInvalid { .. },
        ) => unsupported(),
        // A wrong passphrase makes noise of it, and noise is sometimes well padded.
        _ => misconfigured(path, "its passphrase is another one, or the file is damaged"),
    })
}

/// A private key as a PEM file's text; in PKCS#8 either way, so that OpenSSL reads it.
pub(super) fn to_pem(document: &SecretDocument, passphrase: Option<&SecretString>) -> Result<Zeroizing<String>, Unspecified> {
    let Some(passphrase) = passphrase else {
        return Ok(document.to_pem(PLAIN, LineEnding::LF).expect("a key is far below PEM's limits"));
    };
    let (mut salt, mut iv) = ([0; 16], [0; 16]);
    rand::fill(&mut salt)?;
    rand::fill(&mut iv)?;
    // OpenSSL's own numbers, above which it refuses to read; 16 MiB.
    let kdf = ScryptParams { salt: &salt, cost_parameter: 1 << 14, block_size: 8, parallelization: 1, key_length: None };
    let scheme = Parameters { kdf: Kdf::Scrypt(kdf), encryption: EncryptionScheme::Aes256Cbc { iv: &iv } };
    let info = PrivateKeyInfo::try_from(document.as_bytes()).map_err(|_| Unspecified)?;
    let encrypted = info.encrypt_with_params(scheme, passphrase.expose_secret()).map_err(|_| Unspecified)?;
    Ok(encrypted.to_pem(ENCRYPTED, LineEnding::LF).expect("a key is far below PEM's limits"))
}

fn not_pem(path: &Path) -> String {
    let path = path.display();
    format!(
        "it is not a PEM file; if it is a key in DER, convert it with `openssl pkcs8 -topk8 -nocrypt -inform DER -in {path} -out NEW` \
         and `chmod 600 NEW`"
    )
}

fn wrong_label(path: &Path, label: &str, text: &str) -> String {
    let path = path.display();
    if text.contains("Proc-Type: 4,ENCRYPTED") {
        return format!(
            "the private key is encrypted in the older form of {label}: convert it with `openssl pkcs8 -topk8 -v2 aes-256-cbc -in {path} \
             -out NEW` and `chmod 600 NEW`"
        );
    }
    if label.ends_with("SIGSTORE PRIVATE KEY") {
        return format!(
            "it is cosign's own {label}, which only cosign reads: make a key with `countersign key generate`, and cosign verifies with its public half"
        );
    }
    match label {
        "RSA PRIVATE KEY" | "EC PRIVATE KEY" | "EC PARAMETERS" => format!(
            "the private key is in the older form {label} and not in PKCS#8: convert it with `openssl pkcs8 -topk8 -nocrypt -in {path} \
             -out NEW` and `chmod 600 NEW`"
        ),
        label if label.ends_with("PUBLIC KEY") => "it is a public key, which cannot sign: name the private key's file".to_owned(),
        label => format!("it is a PEM file of {label}, not of a PRIVATE KEY (PKCS#8): make one with `countersign key generate`"),
    }
}
