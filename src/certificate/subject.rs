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
