use rsa::pkcs8::der::{Encode, asn1::UintRef};

/// The `ECDSA-Sig-Value` (RFC 3279 section 2.2.3) of a P-256 signature that is written as its two numbers, 32 bytes each; `None` if it
/// is of another length.
pub(super) fn der_of_p256(raw: &[u8]) -> Option<Vec<u8>> {
    let (r, s) = raw.split_at_checked(32).filter(|(_, s)| s.len() == 32)?;
    [UintRef::new(r).ok()?, UintRef::new(s).ok()?].to_der().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn der(r: &[u8], s: &[u8]) -> String {
        let pad = |number: &[u8]| [vec![0; 32 - number.len()], number.to_vec()].concat();
        hex::encode(der_of_p256(&[pad(r), pad(s)].concat()).unwrap())
    }

    #[test]
    fn numbers_are_as_short_as_they_can_be_and_never_negative() {
        assert_eq!(der(&[1], &[0x7F]), "300602010102017f");
        assert_eq!(der(&[0x80], &[0xFF, 0]), "300902020080020300ff00");
        assert_eq!(der(&[], &[1]), "3006020100020101");
        let long = der(&[0xFF; 32], &[0x80; 32]);
        assert_eq!((long.len() / 2, &long[..10]), (72, "3046022100"));
        let plain = der(&[0x7F; 32], &[0x01; 32]);
        assert_eq!((plain.len() / 2, &plain[..8]), (70, "30440220"));
    }

    #[test]
    fn other_lengths_are_refused() {
        for length in [0, 32, 63, 65, 70, 96] {
            assert_eq!(der_of_p256(&vec![1; length]), None);
        }
    }
}
