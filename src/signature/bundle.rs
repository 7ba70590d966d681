//! The sigstore bundle, version 0.3, as a referrer: what cosign 3 writes and reads first.
//!
//! What is signed is SHA-256 of a DSSE pre-authentication encoding of an in-toto statement that names the digest, and no
//! reference: it is valid for the digest wherever that is. The bundle holds statement and signature, and a hint at the key;
//! no certificate, no log entry. Everything here is pure.
//!
//! Sources: in-toto Statement v1, DSSE 1.0 ("PAE"), sigstore's protobuf-specs (`sigstore_bundle.proto`).

use std::collections::BTreeMap;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::IgnoredAny};
use sha2::{Digest as _, Sha256};

use super::{
    Claim,
    referrer::{CREATED_ANNOTATION, Layouts, Referrer},
};
use crate::{
    kms::{PublicKey, RawSignature},
    oci::Digest,
    subject::Subject,
};

/// The type of the artifact, and the media type of its blob and of the bundle itself.
pub const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
/// What the statement says of its subject: that it is signed, and nothing more.
pub const PREDICATE_TYPE: &str = "https://sigstore.dev/cosign/sign/v1";
/// The annotation of the manifest that repeats the predicate's type. Unauthenticated.
pub const PREDICATE_ANNOTATION: &str = "dev.sigstore.bundle.predicateType";
/// The annotation of the manifest that repeats the bundle's hint. Ours; unauthenticated, and so used for order only.
pub const HINT_ANNOTATION: &str = "dev.countersign.key";
/// No bundle is read that is larger, in bytes. Ours have less than one thousand; those with certificate and log entry some ten.
pub const MAX_BUNDLE: u64 = 1024 * 1024;

const CONTENT_ANNOTATION: &str = "dev.sigstore.bundle.content";
const CONTENT: &str = "dsse-envelope";
const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";
/// A statement about more subjects than these is not read.
const MAX_SUBJECTS: usize = 1024;

/// Bytes that are ready to be signed, made from a subject that the registry served and we hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    subject: Subject,
    statement: Vec<u8>,
    pae_sha256: [u8; 32],
    created: Timestamp,
}

impl Prepared {
    /// The statement that says: this digest is signed. `created` goes into the manifest, to the second. Same input, same
    /// bytes: so it is to be when the image was pushed, and not when it is signed.
    #[must_use]
    pub fn new(subject: &Subject, created: Timestamp) -> Self {
        let statement = Statement {
            r#type: STATEMENT_TYPE.into(),
            subject: vec![About { digest: BTreeMap::from([("sha256".to_owned(), subject.digest().encoded().to_owned())]) }],
            predicate_type: PREDICATE_TYPE.into(),
            predicate: Some(Empty {}),
        };
        let statement = serde_json::to_vec(&statement).expect("texts always serialise");
        let pae_sha256 = Sha256::digest(pae(PAYLOAD_TYPE, &statement)).into();
        let created = Timestamp::from_second(created.as_second()).expect("whole seconds are within bounds if parts of them are");
        Self { subject: subject.clone(), statement, pae_sha256, created }
    }

    /// What the KMS signs: SHA-256 of the pre-authentication encoding, 32 bytes.
    pub fn pae_sha256(&self) -> &[u8; 32] {
        &self.pae_sha256
    }

    /// The artifact that holds the statement and its signature by this key (PKCS#1 octets, or an ASN.1 `ECDSA-Sig-Value`).
    #[must_use]
    pub fn assemble(&self, signature: &RawSignature, key: &PublicKey) -> Referrer {
        let hint = hint(key);
        let bundle = Written {
            media_type: MEDIA_TYPE,
            verification_material: WrittenMaterial { public_key: Hint { hint: &hint } },
            dsse_envelope: WrittenEnvelope {
                payload: BASE64_STANDARD.encode(&self.statement),
                payload_type: PAYLOAD_TYPE,
                signatures: [WrittenSignature { sig: BASE64_STANDARD.encode(signature) }],
            },
        };
        let bundle = serde_json::to_vec(&bundle).expect("texts always serialise");
        let annotations = [
            (CONTENT_ANNOTATION, CONTENT.to_owned()),
            (PREDICATE_ANNOTATION, PREDICATE_TYPE.to_owned()),
            (CREATED_ANNOTATION, self.created.to_string()),
            (HINT_ANNOTATION, hint),
        ];
        let annotations = annotations.map(|(name, value)| (name.to_owned(), value)).into();
        Referrer::new(Layouts::Current, MEDIA_TYPE, MEDIA_TYPE, &bundle.into(), &self.subject, &annotations)
    }
}

/// How a bundle names a key: base64 of SHA-256 of its `SubjectPublicKeyInfo`.
#[must_use]
pub fn hint(key: &PublicKey) -> String {
    BASE64_STANDARD.encode(Sha256::digest(key.spki_der()))
}

/// What a bundle says, read as strictly as its strictest reader reads it: no member that is not the format's, none twice, one
/// signature.
///
/// # Errors
/// A clause that says why no verifier would take it as a signature.
pub fn read(bundle: &[u8]) -> Result<Claim, String> {
    if bundle.len() as u64 > MAX_BUNDLE {
        return Err(format!("it has more than {MAX_BUNDLE} bytes"));
    }
    let bundle: Bundle = serde_json::from_slice(bundle).map_err(|error| error.to_string())?;
    if bundle.media_type != MEDIA_TYPE {
        return Err(format!("it is {:?}, not {MEDIA_TYPE:?}", short(&bundle.media_type)));
    }
    let Envelope { payload, payload_type, signatures } = bundle.dsse_envelope;
    if payload_type != PAYLOAD_TYPE {
        return Err(format!("its payload is {:?}, not {PAYLOAD_TYPE:?}", short(&payload_type)));
    }
    let decode = |what: &str, text: &str| BASE64_STANDARD.decode(text).map_err(|error| format!("its {what}: {error}"));
    let [signature] =
        <[Signature; 1]>::try_from(signatures).map_err(|many| format!("it has {} signatures, not one", many.len()))?;
    let statement_bytes = decode("payload", &payload)?;
    let statement: Statement =
        serde_json::from_slice(&statement_bytes).map_err(|error| format!("its payload is no statement: {error}"))?;
    if statement.r#type != STATEMENT_TYPE {
        return Err(format!("its payload is {:?}, not {STATEMENT_TYPE:?}", short(&statement.r#type)));
    }
    if statement.predicate_type != PREDICATE_TYPE {
        return Err(format!("it states {:?} of the image, which is not that it is signed", short(&statement.predicate_type)));
    }
    if statement.subject.len() > MAX_SUBJECTS {
        return Err(format!("it is about more than {MAX_SUBJECTS} subjects"));
    }
    let digests = statement.subject.iter().filter_map(|about| format!("sha256:{}", about.digest.get("sha256")?).parse().ok());
    let digests: Vec<Digest> = digests.collect();
    if digests.is_empty() {
        return Err("it names no sha256 digest".to_owned());
    }
    Ok(Claim {
        signed_sha256: Sha256::digest(pae(PAYLOAD_TYPE, &statement_bytes)).into(),
        signature: decode("signature", &signature.sig)?,
        digests,
        reference: None,
        notation: None,
    })
}

/// DSSE's pre-authentication encoding: what is signed, so that no payload can be taken for one of another type.
fn pae(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let head = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len());
    [head.as_bytes(), payload].concat()
}

fn short(text: &str) -> String {
    text.chars().take(120).collect()
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Statement {
    #[serde(rename = "_type")]
    r#type: String,
    subject: Vec<About>,
    predicate_type: String,
    // Nothing is asked of it: some write null, some leave it out.
    #[serde(skip_deserializing)]
    predicate: Option<Empty>,
}

#[derive(Serialize, Deserialize)]
struct About {
    digest: BTreeMap<String, String>,
}

#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    media_type: &'a str,
    verification_material: WrittenMaterial<'a>,
    dsse_envelope: WrittenEnvelope<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WrittenMaterial<'a> {
    public_key: Hint<'a>,
}

#[derive(Serialize)]
struct Hint<'a> {
    hint: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WrittenEnvelope<'a> {
    payload: String,
    payload_type: &'a str,
    signatures: [WrittenSignature; 1],
}

#[derive(Serialize)]
struct WrittenSignature {
    sig: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Bundle {
    media_type: String,
    #[serde(rename = "verificationMaterial")]
    _verification_material: Material,
    dsse_envelope: Envelope,
}

/// Which key it was, with which proofs of its time: the keys that are trusted here are known, so none of it is looked at.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Material {
    #[serde(rename = "publicKey")]
    _public_key: Option<IgnoredAny>,
    #[serde(rename = "certificate")]
    _certificate: Option<IgnoredAny>,
    #[serde(rename = "tlogEntries")]
    _tlog_entries: Option<IgnoredAny>,
    #[serde(rename = "timestampVerificationData")]
    _timestamp_verification_data: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<Signature>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Signature {
    sig: String,
    #[serde(rename = "keyid")]
    _keyid: Option<IgnoredAny>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        kms::Algorithm,
        oci::media_type,
        signature::{
            cosign::tests::{IMAGE, REFERENCE, vector},
            referrer::ReferrerManifest,
        },
    };

    fn prepared() -> Prepared {
        Prepared::new(&Subject::in_test(REFERENCE, IMAGE), "2025-01-02T03:04:05.4Z".parse().unwrap())
    }

    fn key(name: &str) -> PublicKey {
        PublicKey::from_pem(&String::from_utf8(vector("keys", &format!("{name}.pub.pem"))).unwrap()).unwrap()
    }

    fn value(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    #[test]
    fn statement_and_encoding_are_the_vectors_byte_for_byte() {
        for folder in ["B-rsa-pkcs1", "B-ecdsa-p256"] {
            let prepared = prepared();
            assert_eq!(prepared.statement, vector(folder, "statement.json"), "{folder}");
            assert_eq!(pae(PAYLOAD_TYPE, &prepared.statement), vector(folder, "pae.bin"), "{folder}");
            let hash = String::from_utf8(vector(folder, "pae.sha256.hex")).unwrap();
            assert_eq!(hex::encode(prepared.pae_sha256()), hash.trim(), "{folder}");
        }
    }

    #[test]
    fn bundle_and_manifest_are_the_vectors_and_a_hint_more() {
        for (folder, name) in [("B-rsa-pkcs1", "rsa2048"), ("B-ecdsa-p256", "p256")] {
            let claim = read(&vector(folder, "bundle.json")).unwrap();
            let referrer = prepared().assemble(&RawSignature(claim.signature), &key(name));
            assert_eq!(referrer.blob(), &vector(folder, "bundle.json"), "{folder}");
            let mut ours = value(referrer.manifest());
            assert_eq!(ours["annotations"][HINT_ANNOTATION], hint(&key(name)));
            ours["annotations"].as_object_mut().unwrap().remove(HINT_ANNOTATION);
            assert_eq!(ours, value(&vector(folder, "manifest.json")), "{folder}");
            let mut entry = serde_json::to_value(referrer.descriptor()).unwrap();
            let expected = &value(&vector(folder, "referrers-index.json"))["manifests"][0];
            entry["annotations"].as_object_mut().unwrap().remove(HINT_ANNOTATION);
            assert_eq!(entry["annotations"], expected["annotations"], "{folder}");
            assert_eq!(entry["artifactType"], expected["artifactType"], "{folder}");
        }
    }

    #[test]
    fn the_vectors_are_read_and_only_the_right_keys_verify_them() {
        for (folder, name, algorithm, stands) in [
            ("B-rsa-pkcs1", "rsa2048", Algorithm::RsaPkcs1Sha256, true),
            ("B-ecdsa-p256", "p256", Algorithm::EcdsaSha256, true),
            ("B-rsa-pss", "rsa2048", Algorithm::RsaPssSha256, true),
            ("B-rsa-pss", "rsa2048", Algorithm::RsaPkcs1Sha256, false),
            ("B-tampered-signature", "rsa2048", Algorithm::RsaPkcs1Sha256, false),
        ] {
            let claim = read(&vector(folder, "bundle.json")).unwrap();
            assert_eq!((claim.digests.as_slice(), &claim.reference), ([Digest::of(IMAGE)].as_slice(), &None));
            let verified = key(name).verify(algorithm, &claim.signed_sha256, &claim.signature);
            assert_eq!(verified.is_ok(), stands, "{folder} {algorithm}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(signature: Vec<u8>, image: Vec<u8>, second in 0i64..4_000_000_000) {
            let created = Timestamp::from_second(second).unwrap();
            let prepared = Prepared::new(&Subject::in_test(REFERENCE, &image), created);
            let referrer = prepared.assemble(&RawSignature(signature.clone()), &key("p256"));
            let claim = read(referrer.blob()).unwrap();
            prop_assert_eq!(claim.signed_sha256, *prepared.pae_sha256());
            prop_assert_eq!((claim.signature, claim.digests), (signature, vec![Digest::of(&image)]));
            let manifest = ReferrerManifest::read(media_type::OCI_MANIFEST, referrer.manifest()).unwrap();
            prop_assert_eq!(manifest.annotations[CREATED_ANNOTATION].parse::<Timestamp>().unwrap(), created);
        }

        #[test]
        fn what_is_no_bundle_is_an_error_and_no_panic(bytes: Vec<u8>) {
            prop_assert!(read(&bytes).is_err());
        }
    }

    #[test]
    fn what_no_verifier_takes_is_refused() {
        let good = value(&vector("B-rsa-pkcs1", "bundle.json"));
        let statement = |change: fn(&mut Value)| {
            let mut statement = value(&vector("B-rsa-pkcs1", "statement.json"));
            change(&mut statement);
            let mut bundle = good.clone();
            bundle["dsseEnvelope"]["payload"] = BASE64_STANDARD.encode(statement.to_string()).into();
            bundle.to_string()
        };
        let with = |pointer: &str, value: Value| {
            let mut changed = good.clone();
            let (parent, name) = pointer.rsplit_once('/').unwrap();
            changed.pointer_mut(parent).unwrap()[name] = value;
            changed.to_string()
        };
        assert!(read(good.to_string().as_bytes()).is_ok());
        assert!(read(statement(|statement| statement["subject"][0]["annotations"] = json!({})).as_bytes()).is_ok(), "cosign's");
        assert!(read(with("/verificationMaterial/tlogEntries", json!([{"logIndex": "1"}])).as_bytes()).is_ok());
        let text = good.to_string();
        for bad in [
            with("/mediaType", json!("application/vnd.dev.sigstore.bundle.v0.2+json")),
            with("/extra", json!(1)),
            with("/dsseEnvelope/extra", json!(1)),
            with("/verificationMaterial/x509CertificateChain", json!({})),
            with("/dsseEnvelope/payloadType", json!("text/plain")),
            with("/dsseEnvelope/payload", json!("e30")),
            with("/dsseEnvelope/signatures", json!([])),
            with("/dsseEnvelope/signatures", json!([{"sig": "AAAA"}, {"sig": "AAAA"}])),
            with("/dsseEnvelope/signatures", json!([{"sig": "A-_A"}])),
            text.replacen("\"dsseEnvelope\"", "\"dsseEnvelope\":{},\"dsseEnvelope\"", 1),
            statement(|statement| statement["_type"] = json!("https://in-toto.io/Statement/v0.1")),
            statement(|statement| statement["predicateType"] = json!("https://example.com/scan-failed/v1")),
            statement(|statement| statement["subject"] = json!([])),
            statement(|statement| statement["subject"] = json!([{"digest": {"sha256": "AB"}}])),
            statement(|statement| statement["subject"] = json!([{"digest": {"sha512": "ab"}}])),
            " ".repeat(usize::try_from(MAX_BUNDLE).unwrap() + 1),
        ] {
            assert!(read(bad.as_bytes()).is_err(), "{}", short(&bad));
        }
    }
}
