//! The two spellings of an ECDSA signature: what KMSs answer (a DER `SEQUENCE` of two `INTEGER`s, RFC 3279 section 2.2.3), and
//! what JOSE and COSE want (both numbers with 32 bytes each, RFC 7518 section 3.4).

use x509_cert::der::{Encode as _, Reader as _, SliceReader, asn1::UintRef};

use super::Error;

const BROKEN: Error = Error::Broken("its signature is no ECDSA signature for P-256");

pub(super) fn from_der(der: &[u8]) -> Result<[u8; 64], Error> {
    let mut reader = SliceReader::new(der).map_err(|_| BROKEN)?;
    let (r, s) = reader
        .sequence(|reader| Ok((reader.decode::<UintRef<'_>>()?, reader.decode::<UintRef<'_>>()?)))
        .and_then(|numbers| reader.finish(numbers))
        .map_err(|_| BROKEN)?;
    let mut raw = [0; 64];
    for (number, place) in [r, s].into_iter().zip(raw.chunks_exact_mut(32)) {
        let bytes = number.as_bytes();
        let start = place.len().checked_sub(bytes.len()).ok_or(BROKEN)?;
        place[start..].copy_from_slice(bytes);
    }
    Ok(raw)
}

pub(super) fn to_der(raw: &[u8]) -> Result<Vec<u8>, Error> {
    if raw.len() != 64 {
        return Err(BROKEN);
    }
    let (r, s) = raw.split_at(32);
    let numbers = [UintRef::new(r), UintRef::new(s)].into_iter().collect::<Result<Vec<_>, _>>();
    numbers.and_then(|numbers| numbers.to_der()).map_err(|_| BROKEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_are_the_same_numbers() {
        let mut short = [0; 64];
        (short[31], short[32], short[63]) = (1, 0x80, 7);
        for raw in [[0x11; 64], [0xff; 64], short] {
            assert_eq!(from_der(&to_der(&raw).unwrap()).unwrap(), raw);
        }
        assert_eq!(to_der(&short).unwrap()[..5], [0x30, 0x26, 2, 1, 1]);
    }

    #[test]
    fn what_is_no_signature_is_refused() {
        let good = to_der(&[0x11; 64]).unwrap();
        let trailing = [good.as_slice(), &[0]].concat();
        let long = [&[0x30, 0x26, 2, 0x21, 1][..], &[0; 32], &[2, 1, 1]].concat();
        let negative = [0x30, 6, 2, 1, 0x80, 2, 1, 1];
        for der in [&[][..], &[0x30, 0], &trailing, &good[..good.len() - 1], &long, &negative, &[0x11; 64]] {
            assert!(from_der(der).is_err(), "{der:02x?}");
        }
        for raw in [&[][..], &[1; 63], &[1; 65], &good] {
            assert!(to_der(raw).is_err());
        }
    }
}
