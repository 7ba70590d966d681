use std::{
    fmt,
    hash::{Hash, Hasher},
    path::PathBuf,
    str::from_utf8,
};

use crate::kms::SecretSource;

/// A private key in a token behind a PKCS#11 module: `pkcs11:token=LABEL;object=LABEL?module-path=/path/module.so` (RFC 7512).
/// What is written of it holds no PIN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pkcs11Reference {
    /// What tells the token from others; at least one of these is there.
    pub(super) token: Option<String>,
    pub(super) manufacturer: Option<String>,
    pub(super) model: Option<String>,
    pub(super) serial: Option<String>,
    pub(super) slot: Option<u64>,
    /// What tells the key from others (`CKA_ID` and `CKA_LABEL`); at least one of the two is there.
    pub(super) id: Option<Vec<u8>>,
    pub(super) object: Option<String>,
    pub(super) module: Place,
    /// Where the PIN is, if the reference says it.
    pub(super) pin: Option<SecretSource>,
}

/// Where the module's shared library is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Path(PathBuf),
    /// `softhsm2` for `libsofthsm2.so` or `softhsm2.so`, where such libraries usually are.
    Name(String),
}

const TWICE: &str = "an attribute stands there twice";
const FORM: &str = "write pkcs11:token=LABEL;object=LABEL?module-path=/path/module.so (RFC 7512), with %20 for a space";

impl Pkcs11Reference {
    /// The text after `pkcs11:`, or `None` if it does not begin so.
    pub(in crate::kms) fn after_scheme(text: &str) -> Option<&str> {
        let (scheme, rest) = text.split_once(':')?;
        scheme.eq_ignore_ascii_case("pkcs11").then_some(rest)
    }

    /// Reads what follows `pkcs11:`; or what is wrong with it, for people, without anything of it.
    pub(in crate::kms) fn read(rest: &str) -> Result<Self, &'static str> {
        let (path, query) = rest.split_once('?').map_or((rest, None), |(path, query)| (path, Some(query)));
        let mut parts = Parts::default();
        for attribute in path.split(';') {
            let (name, value) = attribute.split_once('=').ok_or(FORM)?;
            parts.path_attribute(name, decoded(value, b":[]@!$'()*+,=&")?)?;
        }
        for attribute in query.into_iter().flat_map(|query| query.split('&')) {
            let (name, value) = attribute.split_once('=').ok_or(FORM)?;
            parts.query_attribute(name, decoded(value, b":[]@!$'()*+,=/?|;")?)?;
        }
        parts.whole()
    }

    /// The beginning of a text that is no reference, up to where a PIN may stand in it.
    pub(in crate::kms) fn shown(text: &str) -> String {
        let lower = text.to_ascii_lowercase();
        match [";pin", "?pin", "&pin", ":pin"].into_iter().filter_map(|mark| lower.find(mark)).min() {
            Some(at) => format!("{}…", &text[..=at]),
            None => text.to_owned(),
        }
    }

    /// Whether the PIN itself stands in the reference, where everybody sees it who sees the configuration.
    pub(crate) fn holds_pin(&self) -> bool {
        matches!(self.pin, Some(SecretSource::Given(_)))
    }
}

/// What has been read so far.
#[derive(Default)]
struct Parts {
    token: Option<String>,
    manufacturer: Option<String>,
    model: Option<String>,
    serial: Option<String>,
    slot: Option<u64>,
    id: Option<Vec<u8>>,
    object: Option<String>,
    kind: Option<()>,
    module: Option<Place>,
    pin: Option<SecretSource>,
}

impl Parts {
    fn path_attribute(&mut self, name: &str, value: Vec<u8>) -> Result<(), &'static str> {
        match name {
            "token" => once(&mut self.token, text(value)?),
            "manufacturer" => once(&mut self.manufacturer, text(value)?),
            "model" => once(&mut self.model, text(value)?),
            "serial" => once(&mut self.serial, text(value)?),
            "slot-id" => {
                let number = text(value)?.parse().map_err(|_| "slot-id is the number of a slot")?;
                once(&mut self.slot, number)
            }
            "id" if value.is_empty() => Err("id is empty: write its bytes as %01%02"),
            "id" => once(&mut self.id, value),
            "object" => once(&mut self.object, text(value)?),
            "type" if value == b"private" => once(&mut self.kind, ()),
            "type" => Err("what signs is a private key: type=private, or leave type out"),
            _ => Err(
                "before the ? stand token, serial, manufacturer, model, slot-id, object, id and type=private, and nothing else",
            ),
        }
    }

    fn query_attribute(&mut self, name: &str, value: Vec<u8>) -> Result<(), &'static str> {
        match name {
            "module-path" => {
                let path = PathBuf::from(text(value)?);
                if !path.is_absolute() {
                    return Err("module-path is an absolute path: module-path=/usr/lib/softhsm/libsofthsm2.so");
                }
                once(&mut self.module, Place::Path(path)).map_err(|_| ONE_MODULE)
            }
            "module-name" => {
                let name = text(value)?;
                if name.contains('/') {
                    return Err("module-name is the name of a library without folder, `lib` and `.so`; module-path takes a path");
                }
                once(&mut self.module, Place::Name(name)).map_err(|_| ONE_MODULE)
            }
            "pin-source" => {
                let source = text(value)?;
                let path = source.strip_prefix("file://").or_else(|| source.strip_prefix("file:")).unwrap_or(&source);
                if !path.starts_with('/') {
                    return Err("pin-source is a file with an absolute path: pin-source=file:/run/secrets/pin");
                }
                once(&mut self.pin, SecretSource::File(path.into())).map_err(|_| ONE_PIN)
            }
            "pin-value" => once(&mut self.pin, SecretSource::Given(text(value)?.into())).map_err(|_| ONE_PIN),
            _ => Err("after the ? stand module-path, module-name, pin-source and pin-value, and nothing else"),
        }
    }

    fn whole(self) -> Result<Pkcs11Reference, &'static str> {
        let Self { token, manufacturer, model, serial, slot, id, object, kind: _, module, pin } = self;
        if [&token, &manufacturer, &model, &serial].into_iter().all(Option::is_none) && slot.is_none() {
            return Err("it names no token: token=LABEL, serial= or slot-id=");
        }
        if id.is_none() && object.is_none() {
            return Err("it names no key: object=LABEL or id=%01");
        }
        let module = module.ok_or("it names no module: ?module-path=/path/module.so")?;
        Ok(Pkcs11Reference { token, manufacturer, model, serial, slot, id, object, module, pin })
    }
}

const ONE_MODULE: &str = "module-path or module-name, one of the two and once";
const ONE_PIN: &str = "pin-source or pin-value, one of the two and once";

fn once<T>(slot: &mut Option<T>, value: T) -> Result<(), &'static str> {
    if slot.replace(value).is_some() { Err(TWICE) } else { Ok(()) }
}

fn text(value: Vec<u8>) -> Result<String, &'static str> {
    let text = String::from_utf8(value).map_err(|_| "a value is no UTF-8 text")?;
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err("a value is empty or has a control character in it");
    }
    Ok(text)
}

/// Undoes percent-encoding. Beside `%` only unreserved characters (RFC 3986 section 2.3) and these may stand there.
fn decoded(value: &str, others: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut bytes = value.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    while let [first, rest @ ..] = bytes {
        bytes = rest;
        if *first == b'%' {
            let hex = rest.get(..2).filter(|hex| hex.iter().all(u8::is_ascii_hexdigit)).and_then(|hex| from_utf8(hex).ok());
            let byte = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
            decoded.push(byte.ok_or("after % stand two hexadecimal digits; % itself is %25")?);
            bytes = &rest[2..];
        } else if is_unreserved(*first) || others.contains(first) {
            decoded.push(*first);
        } else {
            return Err("a value has a character in it that has to be written with %: a space is %20, ; is %3B, / is %2F");
        }
    }
    Ok(decoded)
}

fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

impl fmt::Display for Pkcs11Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts = [
            ("token", &self.token),
            ("manufacturer", &self.manufacturer),
            ("model", &self.model),
            ("serial", &self.serial),
            ("object", &self.object),
        ];
        let texts = texts.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", encoded(value.as_ref()?, b""))));
        let slot = self.slot.map(|slot| format!("slot-id={slot}"));
        let id = self.id.as_ref().map(|id| id.iter().fold("id=".to_owned(), |text, byte| format!("{text}%{byte:02X}")));
        let path: Vec<_> = texts.chain(slot).chain(id).collect();
        write!(f, "pkcs11:{}?", path.join(";"))?;
        match &self.module {
            Place::Path(path) => write!(f, "module-path={}", encoded(&path.to_string_lossy(), b"/"))?,
            Place::Name(name) => write!(f, "module-name={}", encoded(name, b""))?,
        }
        match &self.pin {
            Some(SecretSource::File(path)) => write!(f, "&pin-source=file:{}", encoded(&path.to_string_lossy(), b"/")),
            Some(SecretSource::Variable(_) | SecretSource::Given(_)) | None => Ok(()),
        }
    }
}

fn encoded(text: &str, others: &[u8]) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |text, byte| {
        if is_unreserved(byte) || others.contains(&byte) {
            text + from_utf8(&[byte]).unwrap_or_default()
        } else {
            format!("{text}%{byte:02X}")
        }
    })
}

impl Hash for Pkcs11Reference {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.to_string().hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kms::KeyUri;

    fn read(text: &str) -> Pkcs11Reference {
        match text.parse() {
            Ok(KeyUri::Pkcs11(reference)) => reference,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn references_are_read_and_written_back() {
        for text in [
            "pkcs11:token=images;object=release?module-path=/usr/lib/softhsm/libsofthsm2.so",
            "pkcs11:token=The%20Software%20PKCS%2311%20softtoken;object=a%2Fb%3Bc?module-path=/usr/lib/a%20b.so",
            "pkcs11:token=t;manufacturer=m;model=o;serial=4f1a;object=r;slot-id=3;id=%01%AB?module-name=softhsm2",
            "pkcs11:slot-id=0;id=%00?module-path=/m.so&pin-source=file:/run/secrets/pin",
        ] {
            assert_eq!(read(text).to_string(), text);
        }
        let written = "PKCS11:type=private;id=ab%01;serial=1?pin-source=/run/pin&module-path=/m.so";
        assert_eq!(read(written).to_string(), "pkcs11:serial=1;id=%61%62%01?module-path=/m.so&pin-source=file:/run/pin");
        let (a, b) =
            (read("pkcs11:token=a;object=%7e?module-name=m"), read("pkcs11:object=~;token=a;type=private?module-name=m"));
        assert_eq!(a, b);
        assert_eq!(
            read("pkcs11:token=a;object=o?module-path=/m&pin-source=file:///p").pin,
            Some(SecretSource::File("/p".into()))
        );
    }

    #[test]
    fn what_is_no_reference_is_refused_with_its_reason() {
        for (text, part) in [
            ("pkcs11:", "RFC 7512"),
            ("pkcs11:token", "RFC 7512"),
            ("pkcs11://token=a;object=b?module-path=/m", "before the ? stand"),
            ("pkcs11:object=a?module-path=/m", "names no token"),
            ("pkcs11:token=a?module-path=/m", "names no key"),
            ("pkcs11:token=a;object=b", "names no module"),
            ("pkcs11:token=a;object=b?", "RFC 7512"),
            ("pkcs11:token=a;token=b;object=c?module-path=/m", "twice"),
            ("pkcs11:token=a;object=b;type=cert?module-path=/m", "private key"),
            ("pkcs11:token=a;object=b;x-vendor=c?module-path=/m", "and nothing else"),
            ("pkcs11:token=a;object=b;library-version=3?module-path=/m", "and nothing else"),
            ("pkcs11:token=a;object=b;pin-value=1?module-path=/m", "and nothing else"),
            ("pkcs11:token=a;object=b?module-path=/m&x-vendor=c", "and nothing else"),
            ("pkcs11:token=a;object=b?module-path=/m&Pin-Value=1", "and nothing else"),
            ("pkcs11:token=a;object=?module-path=/m", "empty"),
            ("pkcs11:token=a;id=?module-path=/m", "empty"),
            ("pkcs11:token=a%0A;object=b?module-path=/m", "control"),
            ("pkcs11:token=%FF;object=b?module-path=/m", "UTF-8"),
            ("pkcs11:token=a b;object=b?module-path=/m", "%20"),
            ("pkcs11:token=a/b;object=b?module-path=/m", "%2F"),
            ("pkcs11:token=ä;object=b?module-path=/m", "written with %"),
            ("pkcs11:token=%4;object=b?module-path=/m", "two hexadecimal digits"),
            ("pkcs11:token=%4ü;object=b?module-path=/m", "two hexadecimal digits"),
            ("pkcs11:token=%+1;object=b?module-path=/m", "two hexadecimal digits"),
            ("pkcs11:slot-id=-1;object=b?module-path=/m", "number of a slot"),
            ("pkcs11:token=a;object=b?module-path=m.so", "absolute"),
            ("pkcs11:token=a;object=b?module-name=../m", "without folder"),
            ("pkcs11:token=a;object=b?module-path=/m&module-name=m", "one of the two"),
            ("pkcs11:token=a;object=b?module-path=/m&pin-source=pin", "absolute"),
            ("pkcs11:token=a;object=b?module-path=/m&pin-source=|cat%20pin", "absolute"),
            ("pkcs11:token=a;object=b?module-path=/m&pin-source=/p&pin-value=1", "one of the two"),
        ] {
            let error = text.parse::<KeyUri>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error:?} does not say {part:?}");
        }
    }

    #[test]
    fn a_pin_is_shown_nowhere() {
        let reference = read("pkcs11:token=a;object=b?module-path=/m&pin-value=hunter2");
        assert!(reference.holds_pin());
        assert!(!format!("{reference} {reference:?}").contains("hunter2"));
        for text in [
            "pkcs11:token=a;object=b;pin-value=hunter2?module-path=/m",
            "PKCS11:token=a;object=b?module-path=m&PIN-value=hunter2",
            "pkcs11:pin-value=hunter2",
            "pkcs11:token=a?pin-value=hunter2&module-path=/m",
        ] {
            let error = text.parse::<KeyUri>().unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
        }
    }
}
