use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use jiff::Timestamp;

use crate::{
    kms::Algorithm,
    oci::RegistryName,
    rule::{SignatureType, Trigger},
    signature::Format,
};

use super::{
    names::{self, PLAIN},
    problem::Place,
    reader::{Section, optional},
    registry,
    report::Report,
    scope::{SCOPE, Scope, TAG_PATTERN, scope, tag_pattern},
    shape::{Choice, Key, Kind, Table, Word},
    value::Value,
};

/// Which images are signed, by whom, and how.
#[derive(Debug, Clone)]
pub struct Rule {
    pub name: String,
    /// None: every configured registry.
    pub registry: Option<RegistryName>,
    pub scope: Scope,
    /// Never holds all of `scope`.
    pub exclude: Vec<Scope>,
    /// Patterns in globset's syntax, of which one must hold the tag; empty: every tag.
    pub tags: Vec<String>,
    /// Images pushed before this are not signed.
    pub created: Option<Timestamp>,
    /// One of [`super::Config::witnesses`], by name.
    pub witness: String,
    pub algorithm: Algorithm,
    pub signature_type: SignatureType,
    pub trigger: Trigger,
    /// At least one, each once; every one can be verified with `algorithm`.
    pub formats: Vec<Format>,
    /// How long signatures of notation's formats count; None: as long as their certificate.
    pub expiry: Option<Duration>,
    /// Whether a format and an algorithm are written together that no other verifier takes.
    pub allow_unreadable: bool,
    /// Whether images pushed by digest alone are signed as well.
    pub untagged: bool,
    pub enabled: bool,
    /// Where its section begins, for messages about it.
    pub place: Place,
}

pub(crate) static TABLE: Table = Table {
    title: "[[rule]]",
    doc: "Which images are signed, by whom, and how. Several rules may match one push; each signs.",
    keys: &[
        Key::required("name", Kind::Text(&PLAIN), "\"production\"", "What logs, metrics and people call it."),
        Key::optional(
            "registry",
            Kind::Text(&registry::NAME),
            "\"registry.example.com\"",
            "The [[registry]] that it is about. Every one, if absent.",
        ),
        Key::required(
            "scope",
            Kind::Text(&SCOPE),
            "\"production\"",
            "The repositories that it is about: a namespace with all below it, or a pattern for whole names in which * stays \
             within a segment and ** crosses them.",
        ),
        Key::defaulted(
            "exclude",
            Kind::List(&Kind::Text(&SCOPE)),
            "[]",
            "Repositories that it is not about, although `scope` holds them; written as `scope` is.",
        ),
        Key::optional(
            "tags",
            Kind::List(&Kind::Text(&TAG_PATTERN)),
            "[\"v*\", \"latest\"]",
            "Only images pushed under one of these tags, which may be patterns. All, if absent.",
        ),
        Key::optional("created", Kind::Time, "2026-11-21T09:00:00Z", "Images pushed before this are not signed."),
        Key::required("witness", Kind::Text(&PLAIN), "\"release\"", "The [[witness]] that signs."),
        Key::required(
            "algorithm",
            Kind::Choice(&ALGORITHM),
            "\"ECDSA_SHA_256\"",
            "How its key signs. RSA keys sign with RSA_PKCS1_SHA_256, or for notation with RSA_PSS_SHA_256; P-256 keys with ECDSA_SHA_256.",
        ),
        Key::defaulted("signature_type", Kind::Choice(&SIGNATURE_TYPE), "\"default\"", "What the signature says."),
        Key::defaulted("trigger", Kind::Choice(&TRIGGER), "\"automatic\"", "When it signs."),
        Key::defaulted(
            "formats",
            Kind::List(&Kind::Choice(&FORMAT)),
            "[\"cosign\", \"bundle\"]",
            "How the signature is written, and so who can verify it. With RSA_PSS_SHA_256: [\"notation\"].",
        ),
        Key::optional(
            "expiry",
            Kind::Duration { least: 1_000, most: 100 * 365 * 86_400_000 },
            "\"90d\"",
            "How long notation's signatures count after they are made, which other formats cannot say. As long as their certificate, if \
             absent. The first event of an image after that signs it again.",
        ),
        Key::defaulted(
            "allow_unreadable",
            Kind::Flag,
            "false",
            "Whether RSA_PSS_SHA_256 is taken in the format \"cosign\", in which only `countersign verify` accepts it.",
        ),
        Key::defaulted(
            "untagged",
            Kind::Flag,
            "false",
            "Whether images that are pushed by digest alone are signed as well, such as the platforms of an index.",
        ),
        Key::defaulted("enabled", Kind::Flag, "true", "Whether it signs at all."),
    ],
};

static ALGORITHM: Choice = Choice {
    words: &[
        Word { text: "RSA_PKCS1_SHA_256", doc: "RSASSA-PKCS1-v1_5, for RSA keys." },
        Word {
            text: "RSA_PSS_SHA_256",
            doc: "RSASSA-PSS, for notation with RSA_2048 keys. No verifier of cosign signatures or bundles accepts it.",
        },
        Word { text: "ECDSA_SHA_256", doc: "ECDSA, for P-256 keys." },
    ],
    later: &[],
};

static SIGNATURE_TYPE: Choice = Choice {
    words: &[
        Word { text: "default", doc: "The digest and the tag that it was pushed under." },
        Word { text: "simple", doc: "The digest alone, for images that are replicated under other tags." },
    ],
    later: &[],
};

static TRIGGER: Choice = Choice {
    words: &[
        Word { text: "automatic", doc: "On every push." },
        Word { text: "manual", doc: "Only by the command `countersign sign`." },
    ],
    later: &[],
};

pub(crate) static FORMAT: Choice = Choice {
    words: &[
        Word { text: "cosign", doc: "Simple signing under the .sig tag, which nearly every verifier reads." },
        Word {
            text: "bundle",
            doc: "The sigstore bundle as a referrer, which cosign 3, flux and Kyverno read first if there is one.",
        },
        Word {
            text: "notation",
            doc: "Notation's JWS envelope as a referrer, for notation and Ratify: RSA_PSS_SHA_256 with an RSA_2048 key, or ECDSA_SHA_256.",
        },
        Word { text: "notation-cose", doc: "The same in notation's COSE envelope." },
    ],
    later: &[],
};

pub(crate) fn read(section: &Section<'_>) -> Option<Rule> {
    let name = section.value("name").and_then(|value| value.parse(names::plain));
    let registry = section.value("registry").map(|value| {
        let name = value.parse(registry::registry_name)?;
        section.report.names.registries.check(&value, name.as_str());
        Some(name)
    });
    let scope_value = section.value("scope").and_then(|value| value.parse(|text| scope(section.report, text)));
    let exclude = section.value("exclude").and_then(|value| exclude(&value, scope_value.as_ref()));
    let tags = section.value("tags").map(|value| tags(&value));
    let created = section.value("created").map(|value| value.time());
    let witness = section.value("witness").and_then(|value| {
        let name = value.parse(names::plain)?;
        section.report.names.witnesses.check(&value, &name);
        Some(name)
    });
    let written = section.written("formats").is_some();
    let formats = section.value("formats").and_then(|value| formats(&value));
    let expiry = section.value("expiry").map(|value| Some((value.duration()?, value)));
    let allow_unreadable = section.value("allow_unreadable").and_then(|value| value.flag());
    // In the order of the declared words.
    let algorithm = section.value("algorithm").and_then(|value| Some((value.choice(Algorithm::ALL)?, value)));
    let formats = match &algorithm {
        Some((Algorithm::RsaPssSha256, _)) if !written => Some(vec![Format::Notation]),
        _ => formats,
    };
    let algorithm = algorithm.map(|(algorithm, value)| {
        check_formats(&value, algorithm, formats.as_deref().unwrap_or_default(), allow_unreadable == Some(true));
        algorithm
    });
    let expiry = expiry.map(|expiry| {
        let (expiry, value) = expiry?;
        check_expiry(&value, formats.as_deref()?);
        Some(expiry)
    });
    let signature_type =
        section.value("signature_type").and_then(|value| value.choice([SignatureType::Default, SignatureType::Simple]));
    let trigger = section.value("trigger").and_then(|value| value.choice([Trigger::Automatic, Trigger::Manual]));
    let untagged = section.value("untagged").and_then(|value| value.flag());
    let enabled = section.value("enabled").and_then(|value| value.flag());
    let registry = optional(registry)?;
    if trigger == Some(Trigger::Automatic) && enabled == Some(true) {
        report_no_events(section, registry.as_ref());
    }
    Some(Rule {
        name: name?,
        registry,
        scope: scope_value?,
        exclude: exclude?,
        tags: tags.unwrap_or_else(|| Some(Vec::new()))?,
        created: optional(created)?,
        witness: witness?,
        algorithm: algorithm?,
        signature_type: signature_type?,
        trigger: trigger?,
        formats: formats?,
        expiry: optional(expiry)?,
        allow_unreadable: allow_unreadable?,
        untagged: untagged?,
        enabled: enabled?,
        place: section.report.place(&section.span),
    })
}

/// Warns of rules that do the same as an earlier one.
pub(crate) fn report_same(report: &Report<'_>, rules: &[Rule]) {
    let mut earlier = HashMap::new();
    for rule in rules {
        let which = (&rule.registry, &rule.scope, &rule.exclude, &rule.tags, rule.created, rule.untagged, rule.enabled);
        let how = (&rule.witness, rule.algorithm, rule.signature_type.name(), rule.trigger.name(), &rule.formats, rule.expiry);
        if let Some(first) = earlier.insert((which, how), &rule.name) {
            let message = format!("rule \"{}\" does the same as rule \"{first}\"", rule.name);
            report.warning(report.names.rules.span(&rule.name), message, "remove one of the two".to_owned());
        }
    }
}

/// Why a rule cannot be satisfied with a key of this spec (`RSA_2048`, `ECC_NIST_P256`, `EC_P256` …), and the cure; to be
/// asked once the witness's key is open.
///
/// # Errors
/// The message is ready to be printed, with the rule's place in it.
pub fn check_rule_against_key(rule: &Rule, spec: &str) -> Result<(), String> {
    let spec = spec.to_ascii_uppercase();
    let is_rsa = matches!(spec.as_str(), "RSA_2048" | "RSA_3072" | "RSA_4096");
    let is_p256 = matches!(spec.as_str(), "EC_P256" | "ECC_NIST_P256");
    let is_notation = |format: &Format| format.envelope().is_some();
    if rule.algorithm == Algorithm::RsaPssSha256
        && matches!(spec.as_str(), "RSA_3072" | "RSA_4096")
        && rule.formats.iter().any(is_notation)
    {
        return Err(format!(
            "{}: rule \"{}\" writes notation signatures, and the key of its witness \"{}\" is {spec}, from which notation wants another \
             hash than SHA-256: name an RSA_2048 or a P-256 key, or for other verifiers write algorithm = \"{}\"",
            rule.place,
            rule.name,
            rule.witness,
            Algorithm::RsaPkcs1Sha256
        ));
    }
    let cure = match rule.algorithm {
        Algorithm::RsaPkcs1Sha256 | Algorithm::RsaPssSha256 if is_rsa => return Ok(()),
        Algorithm::EcdsaSha256 if is_p256 => return Ok(()),
        _ if is_p256 => format!("write algorithm = \"{}\"", Algorithm::EcdsaSha256),
        _ if is_rsa => format!("write algorithm = \"{}\"", Algorithm::RsaPkcs1Sha256),
        _ => "use a key of RSA_2048, RSA_3072, RSA_4096 or P-256: not all verifiers accept others".to_owned(),
    };
    Err(format!(
        "{}: rule \"{}\" signs with {}, and the key of its witness \"{}\" is {spec}: {cure}",
        rule.place, rule.name, rule.algorithm, rule.witness
    ))
}

fn exclude(value: &Value<'_>, scope_value: Option<&Scope>) -> Option<Vec<Scope>> {
    value.each(|element| {
        let excluded = element.parse(|text| scope(element.report, text))?;
        if scope_value.is_some_and(|scope| excluded.holds(scope)) {
            let help = "remove it, or write enabled = false".to_owned();
            element.report.error(element.span.clone(), "this rule never matches: `exclude` holds all of its scope", help);
        }
        Some(excluded)
    })
}

fn tags(value: &Value<'_>) -> Option<Vec<String>> {
    let tags = value.each(|element| element.parse(tag_pattern))?;
    if tags.is_empty() {
        let help = "leave `tags` out to sign every tag, or write enabled = false".to_owned();
        value.report.error(value.span.clone(), "this rule never matches: `tags` is empty", help);
    }
    Some(tags)
}

/// The formats of a list, in the order of the declared words.
pub(crate) fn each_format(value: &Value<'_>) -> Option<Vec<Format>> {
    value.each(|element| element.choice(Format::ALL))
}

fn formats(value: &Value<'_>) -> Option<Vec<Format>> {
    let mut formats = each_format(value)?;
    if formats.is_empty() {
        let help = "write formats = [\"cosign\"], or enabled = false".to_owned();
        value.report.error(value.span.clone(), "this rule signs nothing: `formats` is empty", help);
    }
    let mut seen = HashSet::new();
    formats.retain(|format| seen.insert(*format));
    Some(formats)
}

/// What no verifier of a format would accept is not signed, unless the rule insists.
fn check_formats(value: &Value<'_>, algorithm: Algorithm, formats: &[Format], allow_unreadable: bool) {
    let (notations, others): (Vec<Format>, Vec<Format>) = formats.iter().partition(|format| format.envelope().is_some());
    let span = value.span.clone();
    match algorithm {
        Algorithm::RsaPkcs1Sha256 if !notations.is_empty() => {
            let message = format!(
                "no verifier would accept this: notation takes RSA signatures{} with PSS padding only",
                named(&notations)
            );
            let help = "take the format out, and write a second [[rule]] with algorithm = \"RSA_PSS_SHA_256\" for it; the same witness \
                        signs both, if its KMS lets its key";
            value.report.error(span, message, help.to_owned());
        }
        Algorithm::RsaPssSha256 if others == [Format::Cosign] && allow_unreadable => {
            let message = "only `countersign verify` will accept this: cosign, skopeo, podman, CRI-O, Kyverno, policy-controller, \
                           Connaisseur, Ratify and flux reject RSA-PSS signatures in the format \"cosign\"";
            value.report.warning(span, message.to_owned(), format!("for verifiers of cosign signatures {PKCS1}"));
        }
        Algorithm::RsaPssSha256 if !others.is_empty() => {
            let message = format!(
                "no verifier would accept this: cosign, skopeo, podman and Kyverno take RSA signatures{} with PKCS#1 v1.5 padding \
                 only",
                named(&others)
            );
            let insists =
                if allow_unreadable { "write formats = [\"cosign\"], which `countersign verify` accepts; or " } else { "" };
            value.report.error(span, message, format!("{insists}for notation write formats = [\"notation\"]; else {PKCS1}"));
        }
        Algorithm::RsaPkcs1Sha256 | Algorithm::RsaPssSha256 | Algorithm::EcdsaSha256 => {}
    }
}

/// What cannot end by itself is not said to.
fn check_expiry(value: &Value<'_>, formats: &[Format]) {
    if !formats.iter().any(|format| format.envelope().is_some()) {
        let message = format!("signatures{} do not expire", named(formats));
        let help =
            "take `expiry` out, or add \"notation\" or \"notation-cose\" to `formats`: those alone can say until when they count";
        value.report.error(value.span.clone(), message, help.to_owned());
    }
}

const PKCS1: &str = "write algorithm = \"RSA_PKCS1_SHA_256\"; the same RSA key signs it, if its KMS lets it";

/// ` in the formats "a" and "b"`
fn named(formats: &[Format]) -> String {
    let plural = if formats.len() == 1 { "" } else { "s" };
    let formats: Vec<_> = formats.iter().map(|format| format!("\"{format}\"")).collect();
    format!(" in the format{plural} {}", formats.join(" and "))
}

fn report_no_events(section: &Section<'_>, registry: Option<&RegistryName>) {
    let (message, help) = match registry {
        Some(registry) if !section.report.names.has_source_for(registry) => (
            format!("nothing tells this rule of pushes: no [[source]] is for {registry}"),
            "add a [[source]] for it, or write trigger = \"manual\"",
        ),
        None if section.report.names.sources.is_empty() => (
            "nothing tells this rule of pushes: there is no [[source]]".to_owned(),
            "add a [[source]], or write trigger = \"manual\"",
        ),
        _ => return,
    };
    section.report.absent_warning(section.span.clone(), message, help.to_owned());
}
