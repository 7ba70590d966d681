use std::{fmt, str::FromStr};

use x509_cert::{
    attr::{AttributeTypeAndValue, AttributeValue},
    der::{
        asn1::{ObjectIdentifier, PrintableStringRef, SetOfVec, Utf8StringRef},
        oid::db::rfc4519::{COMMON_NAME, COUNTRY_NAME, L, ORGANIZATION_NAME, ORGANIZATIONAL_UNIT_NAME, ST},
    },
    name::{Name, RdnSequence, RelativeDistinguishedName},
};

/// Whom a certificate is for: `C=DE, ST=Berlin, O=Example`, with at least these three, which notation's trust policies need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubjectName(Vec<(Attribute, String)>);

/// Why a text is no such name: a clause.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct WrongSubject(String);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Attribute {
    Country,
    State,
    Locality,
    Organization,
    Unit,
    CommonName,
}

impl Attribute {
    const ALL: [Self; 6] = [Self::Country, Self::State, Self::Locality, Self::Organization, Self::Unit, Self::CommonName];

    fn name(self) -> &'static str {
        match self {
            Self::Country => "C",
            Self::State => "ST",
            Self::Locality => "L",
            Self::Organization => "O",
            Self::Unit => "OU",
            Self::CommonName => "CN",
        }
    }

    fn oid(self) -> ObjectIdentifier {
        match self {
            Self::Country => COUNTRY_NAME,
            Self::State => ST,
            Self::Locality => L,
            Self::Organization => ORGANIZATION_NAME,
            Self::Unit => ORGANIZATIONAL_UNIT_NAME,
            Self::CommonName => COMMON_NAME,
        }
    }
}

/// Why notation's trust policies cannot name this subject, if they cannot: they want C, ST and O, and take no part that has several
/// attributes, none twice, and none that Go knows no name for. notation specifications, "Trust Policy", "Trusted Identities".
pub(super) fn nameless(name: &Name) -> Option<String> {
    /// serialNumber, street and postalCode: RFC 4519 sections 2.31, 2.34 and 2.23.
    const OTHERS: [&str; 3] = ["2.5.4.5", "2.5.4.9", "2.5.4.17"];
    if name.0.iter().any(|part| part.0.len() != 1) {
        return Some("has a part with several attributes".to_owned());
    }
    let oids: Vec<_> = name.0.iter().flat_map(|part| part.0.iter()).map(|part| part.oid).collect();
    let required = [Attribute::Country, Attribute::State, Attribute::Organization];
    let lacking: Vec<_> =
        required.iter().filter(|attribute| !oids.contains(&attribute.oid())).map(|lacked| lacked.name()).collect();
    if !lacking.is_empty() {
        return Some(format!("has no {}", lacking.join(" and no ")));
    }
    let is_known = |oid: &ObjectIdentifier| {
        Attribute::ALL.iter().any(|known| known.oid() == *oid) || OTHERS.contains(&oid.to_string().as_str())
    };
    if let Some(unknown) = oids.iter().find(|oid| !is_known(oid)) {
        return Some(format!("has an attribute that notation has no name for ({unknown})"));
    }
    let twice = oids.iter().enumerate().find(|(place, oid)| oids[..*place].contains(oid));
    twice.map(|(_, oid)| format!("has an attribute twice ({oid})"))
}

impl SubjectName {
    /// For witnesses of whom nothing is said: a country that ISO 3166 leaves to its users, and ourselves.
    #[must_use]
    pub fn unnamed() -> Self {
        let part = |attribute, value: &str| (attribute, value.to_owned());
        Self(vec![part(Attribute::Country, "XX"), part(Attribute::State, "none"), part(Attribute::Organization, "countersign")])
    }

    /// The same with this common name, unless it has one.
    #[must_use]
    pub fn with_common_name(mut self, name: &str) -> Self {
        if !self.0.iter().any(|(attribute, _)| *attribute == Attribute::CommonName) {
            // 64 characters is the most that X.520 allows.
            self.0.push((Attribute::CommonName, name.chars().take(64).collect()));
        }
        self
    }

    pub(super) fn to_name(&self) -> x509_cert::der::Result<Name> {
        let part = |(attribute, value): &(Attribute, String)| {
            let value = match attribute {
                Attribute::Country => AttributeValue::from(PrintableStringRef::new(value)?),
                _ => AttributeValue::from(Utf8StringRef::new(value)?),
            };
            let part = AttributeTypeAndValue { oid: attribute.oid(), value };
            Ok(RelativeDistinguishedName(SetOfVec::try_from(vec![part])?))
        };
        Ok(RdnSequence(self.0.iter().map(part).collect::<Result<_, x509_cert::der::Error>>()?))
    }
}

impl FromStr for SubjectName {
    type Err = WrongSubject;

    fn from_str(text: &str) -> Result<Self, WrongSubject> {
        let wrong = |what: String| Err(WrongSubject(what));
        let mut parts = vec![];
        for part in text.split(',') {
            let Some((name, value)) = part.split_once('=').map(|(name, value)| (name.trim(), value.trim())) else {
                return wrong("its parts are NAME=VALUE, separated by commas".to_owned());
            };
            let Some(attribute) = Attribute::ALL.into_iter().find(|attribute| attribute.name() == name) else {
                return wrong(format!("its parts are {}", Attribute::ALL.map(Attribute::name).join(", ")));
            };
            if parts.iter().any(|(known, _)| *known == attribute) {
                return wrong(format!("it has {name} twice"));
            }
            let is_plain = |c: char| !c.is_control() && !r#""+;<>=\#"#.contains(c);
            if !(1..=64).contains(&value.chars().count()) || !value.chars().all(is_plain) {
                return wrong(format!("{name} is no plain text of 1 to 64 characters"));
            }
            if attribute == Attribute::Country && !(value.len() == 2 && value.bytes().all(|b| b.is_ascii_uppercase())) {
                return wrong("C is a country's two capital letters".to_owned());
            }
            parts.push((attribute, value.to_owned()));
        }
        for needed in [Attribute::Country, Attribute::State, Attribute::Organization] {
            if !parts.iter().any(|(attribute, _)| *attribute == needed) {
                return wrong(format!("it has no {}: notation's trust policies need C, ST and O", needed.name()));
            }
        }
        parts.sort_unstable_by_key(|(attribute, _)| *attribute);
        Ok(Self(parts))
    }
}

impl fmt::Display for SubjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<_> = self.0.iter().map(|(attribute, value)| format!("{}={value}", attribute.name())).collect();
        f.write_str(&parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_that_notation_cannot_name_is_told_with_the_reason() {
        let why = |text: &str| nameless(&text.parse().unwrap());
        for named in ["CN=x,O=o,ST=s,C=DE", "CN=x,OU=u,O=o,L=l,ST=s,C=DE", "serialNumber=1,CN=x,O=o,ST=s,C=DE"] {
            assert_eq!(why(named), None, "{named}");
        }
        for (text, reason) in [
            ("CN=x,C=DE", "has no ST and no O"),
            ("CN=x+OU=u,O=o,ST=s,C=DE", "has a part with several attributes"),
            ("OU=a,OU=b,O=o,ST=s,C=DE", "has an attribute twice (2.5.4.11)"),
            ("DC=example,O=o,ST=s,C=DE", "has an attribute that notation has no name for (0.9.2342.19200300.100.1.25)"),
        ] {
            assert_eq!(why(text).as_deref(), Some(reason), "{text}");
        }
    }

    #[test]
    fn names_have_what_trust_policies_need_and_each_part_once() {
        let name: SubjectName = "O=Example Inc., C=DE,ST=Berlin".parse().unwrap();
        assert_eq!(name.with_common_name("release").to_string(), "C=DE, ST=Berlin, O=Example Inc., CN=release");
        let own: SubjectName = "C=DE, ST=Berlin, O=Example, CN=mine".parse().unwrap();
        assert!(own.with_common_name("release").to_string().ends_with("CN=mine"));
        for wrong in [
            "",
            "Example",
            "C=DE",
            "C=DE, ST=Berlin",
            "C=de, ST=Berlin, O=Example",
            "C=DEU, ST=Berlin, O=Example",
            "C=DE, ST=, O=Example",
            "C=DE, ST=Berlin, O=Example, O=Other",
            "C=DE, ST=Berlin, O=Exa+mple",
            "C=DE, ST=Berlin, O=Example, EMAIL=x",
            &format!("C=DE, ST=Berlin, O={}", "x".repeat(65)),
        ] {
            assert!(wrong.parse::<SubjectName>().is_err(), "{wrong}");
        }
    }
}
