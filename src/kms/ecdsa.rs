use rsa::pkcs8::der::{Decode, Encode, asn1::UintRef};

/// The `ECDSA-Sig-Value` (RFC 3279 section 2.2.3) of a P-256 signature that is written as its two numbers, 32 bytes each; `None` if it
/// is of another length.
pub(super) fn der_of_p256(raw: &[u8]) -> Option<Vec<u8>> {
    let (r, s) = raw.split_at_checked(32).filter(|(_, s)| s.len() == 32)?;
    [UintRef::new(r).ok()?, UintRef::new(s).ok()?].to_der().ok()
}

/// The other way: the two numbers of an `ECDSA-Sig-Value`, 32 bytes each; `None` if it is none of a P-256 signature.
pub(super) fn p256_of_der(der: &[u8]) -> Option<[u8; 64]> {
    let numbers = <[UintRef<'_>; 2]>::from_der(der).ok()?;
    let mut raw = [0; 64];
    for (half, number) in raw.chunks_exact_mut(32).zip(numbers) {
        let bytes = number.as_bytes();
        half[32_usize.checked_sub(bytes.len())?..].copy_from_slice(bytes);
    }
    Some(raw)
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
    fn what_was_put_into_der_comes_out_again() {
        for (r, s) in [(0x01, 0x7F), (0x80, 0xFF), (0, 1)] {
            let raw = [[vec![0; 31], vec![r]].concat(), [vec![s], vec![r; 31]].concat()].concat();
            assert_eq!(p256_of_der(&der_of_p256(&raw).unwrap()).unwrap()[..], raw);
        }
    }

    #[test]
    fn other_lengths_are_refused() {
        for length in [0, 32, 63, 65, 70, 96] {
            assert_eq!(der_of_p256(&vec![1; length]), None);
        }
        let long = [UintRef::new(&[1; 33]).unwrap(), UintRef::new(&[1]).unwrap()].to_der().unwrap();
        let short = der_of_p256(&[1; 64]).unwrap();
        for der in [&long, &short[..short.len() - 1], &[&short[..], &[0]].concat(), b""] {
            assert_eq!(p256_of_der(der), None);
        }
    }
}
