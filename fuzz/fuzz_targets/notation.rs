//! Notation's envelopes, manifests and certificates, as a registry serves them.
#![no_main]

use countersign::{
    certificate::Chain,
    oci::media_type,
    signature::notation::{self, Claim, Envelope, SignatureManifest},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for envelope in Envelope::ALL {
        if let Ok(claim) = Claim::read(envelope, data) {
            // As whoever judges it reads it.
            assert!(notation::read(envelope, data).is_ok());
            assert!(claim.expiry().is_none_or(|expiry| expiry > claim.signing_time()));
        }
    }
    let _ = SignatureManifest::read(media_type::OCI_MANIFEST, data);
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(chain) = Chain::from_pem(text)
    {
        assert_eq!(Chain::from_pem(&chain.to_pem()).expect("what we write, we read"), chain);
    }
    let _ = Chain::from_der(vec![data.to_vec()]);
});
