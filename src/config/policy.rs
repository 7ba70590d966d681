use std::collections::HashSet;

use crate::{
    policy::{self, Mode, Patterns, Policy, SignedAs, Tags},
    signature::Format,
};

use super::{
    names::{self, PLAIN},
    reader::{Section, optional},
    report::{Wrong, cut},
    rule::{self, FORMAT},
    shape::{ANY_TEXT, Choice, Grammar, Key, Kind, Table, Word},
    value::Value,
};

pub(crate) static TABLE: Table = Table {
    title: "[[policy]]",
    doc: "Which images may run where: read by the admission webhook, and by `verify -f`. Where several hold, each has to be met.",
    keys: &[
        Key::required("name", Kind::Text(&PLAIN), "\"payments\"", "What answers, logs and metrics call it."),
        Key::optional("witness", Kind::Text(&PLAIN), "\"release\"", "The [[witness]] that must have signed."),
        Key::optional(
            "witnesses",
            Kind::List(&Kind::Text(&PLAIN)),
            "[\"release\", \"security\"]",
            "Instead of `witness`: each of them must have signed.",
        ),
        Key::optional(
            "cluster",
            Kind::Text(&PLACE),
            "\"prod-eu\"",
            "The cluster that it is about, or a pattern of clusters; as `cluster` in [admission] names them. Every one, if absent.",
        ),
        Key::optional("clusters", Kind::List(&Kind::Text(&PLACE)), "[\"prod-*\", \"staging\"]", "Instead of `cluster`: several."),
        Key::optional("namespace", Kind::Text(&PLACE), "\"payments\"", "The namespace that it is about, or a pattern of them."),
        Key::optional("namespaces", Kind::List(&Kind::Text(&PLACE)), "[\"team-*\"]", "Instead of `namespace`: several."),
        Key::defaulted("enabled", Kind::Flag, "false", "Whether it has any effect."),
        Key::defaulted("mode", Kind::Choice(&MODE), "\"enforce\"", "What becomes of an image that does not meet it."),
        Key::optional("note", Kind::Text(&ANY_TEXT), "\"Agreed with the payments team\"", "For people."),
        Key::optional(
            "formats",
            Kind::List(&Kind::Choice(&FORMAT)),
            "[\"cosign\"]",
            "Only signatures that are written so count. However they are written, if absent.",
        ),
        Key::defaulted("signed_as", Kind::Choice(&SIGNED_AS), "\"name\"", "Which name a signature must be for."),
        Key::defaulted(
            "through_index",
            Kind::Flag,
            "false",
            "Whether one platform's image counts that is not signed itself, where its reference has a tag that names a signed index \
             with it.",
        ),
        Key::optional(
            "max_age",
            Kind::Duration { least: 60_000, most: 100 * 365 * 86_400_000 },
            "\"90d\"",
            "Images that were built longer ago do not run, by the time in the image itself. However old, if absent.",
        ),
        Key::defaulted("tags", Kind::Choice(&TAGS), "\"deny\"", "What is made of an image that is used by a tag."),
        Key::defaulted(
            "allow",
            Kind::List(&Kind::Text(&PATTERN)),
            "[]",
            "Images that it says nothing of: \"registry.example.com/tools/**\", or with a tag or a digest.",
        ),
    ],
};

static PLACE: Grammar = Grammar { noun: "a name or a pattern in quotes", pattern: Some("^[^\\s/]+$") };
pub(crate) static PATTERN: Grammar = Grammar { noun: "an image or a pattern of images in quotes", pattern: Some("^[^\\s]+$") };

static MODE: Choice = Choice {
    words: &[
        Word { text: "enforce", doc: "It does not run." },
        Word { text: "warn", doc: "It runs, and who asked for it is warned." },
        Word { text: "audit", doc: "It runs, and the cluster's audit log says so." },
    ],
    later: &[],
};

static SIGNED_AS: Choice = Choice {
    words: &[
        Word {
            text: "name",
            doc: "The image's repository, and its tag where it is used by one. Signatures of the type `simple` count everywhere.",
        },
        Word { text: "tag", doc: "The image's repository and the tag that it is used by, and nothing less." },
        Word { text: "digest", doc: "Any: the digest alone counts." },
    ],
    later: &[],
};

static TAGS: Choice = Choice {
    words: &[
        Word { text: "deny", doc: "It does not meet the policy, even if it is signed: tags can be moved." },
        Word { text: "resolve", doc: "The mutating webhook pins it to the digest that verified." },
    ],
    later: &[],
};

pub(crate) fn read(section: &Section<'_>) -> Option<Policy> {
    let name = section.value("name").and_then(|value| value.parse(names::plain));
    let witnesses = one_or_several(section, ["witness", "witnesses"], true, |value| {
        let name = value.parse(names::plain)?;
        section.report.names.witnesses.check(value, &name);
        Some(name)
    });
    let clusters = one_or_several(section, ["cluster", "clusters"], false, |value| value.parse(place));
    let namespaces = one_or_several(section, ["namespace", "namespaces"], true, |value| value.parse(place));
    let enabled = section.value("enabled").and_then(|value| value.flag());
    // Choices are in the order of the declared words.
    let mode = section.value("mode").and_then(|value| value.choice(Mode::ALL));
    let note = section.value("note").map(|value| value.text());
    let formats = section.value("formats").map(|value| formats(&value));
    let signed_as = section.value("signed_as").and_then(|value| value.choice(SignedAs::ALL));
    let through_index = section.value("through_index").and_then(|value| value.flag());
    let max_age = section.value("max_age").map(|value| value.duration());
    let tags = section.value("tags").and_then(|value| value.choice(Tags::ALL));
    let allow = section.value("allow").and_then(|value| patterns(&value));
    Some(Policy {
        name: name?,
        witnesses: witnesses?,
        clusters: clusters?,
        namespaces: namespaces?,
        enabled: enabled?,
        note: note.unwrap_or_else(|| Some(String::new()))?,
        mode: mode?,
        formats: formats.unwrap_or_else(|| Some(Vec::new()))?,
        signed_as: signed_as?,
        through_index: through_index?,
        max_age: optional(max_age)?,
        tags: tags?,
        allow: allow?,
    })
}

/// What stands under the key for one, or under the key for several.
fn one_or_several(
    section: &Section<'_>,
    [one, several]: [&'static str; 2],
    required: bool,
    read: impl Fn(&Value<'_>) -> Option<String>,
) -> Option<Vec<String>> {
    match (section.value(one), section.value(several)) {
        (Some(value), None) => Some(vec![read(&value)?]),
        (None, Some(value)) => {
            let given = value.each(&read)?;
            if given.is_empty() {
                return value.wrong(Wrong::new(format!("`{several}` is empty"), "name at least one, or remove the policy"));
            }
            Some(given)
        }
        (Some(_), Some(second)) => {
            let help = format!("write all of them into `{several}`");
            second.wrong(Wrong::new(format!("[[policy]] has `{one}` and `{several}`"), help))
        }
        (None, None) if required => {
            let help = format!("write {one} = \"…\", or {several} = [\"…\", \"…\"]");
            section.report.absent(section.span.clone(), format!("[[policy]] has no `{one}`"), help);
            None
        }
        (None, None) => Some(vec![]),
    }
}

/// A name of a cluster or a namespace, or a pattern of them.
pub(crate) fn place(text: &str) -> Result<String, Wrong> {
    const LONGEST: usize = 253;
    const HELP: &str = "write a name such as \"payments\", or a pattern such as \"team-*\"; \"*\" is all";
    let is_stray = |c: &char| !(c.is_ascii_alphanumeric() || "-_.,!*?[]{}".contains(*c));
    let wrong = |what: &str| Err(Wrong::new(format!("\"{}\" is no name and no pattern of names: {what}", cut(text)), HELP));
    if text.is_empty() || text.len() > LONGEST {
        return wrong("it has 1 to 253 characters");
    }
    if let Some(stray) = text.chars().find(is_stray) {
        return wrong(&format!("it holds {stray:?}"));
    }
    match policy::glob(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(problem) => wrong(&problem),
    }
}

/// Patterns of images.
pub(crate) fn patterns(value: &Value<'_>) -> Option<Vec<String>> {
    value.each(|element| {
        element.parse(|text| {
            let one = [text.to_owned()];
            Patterns::parse(&one).map_err(|_| {
                let help = "write a repository with its registry, such as \"registry.example.com/tools/**\", or an image with its tag \
                            or digest";
                Wrong::new(format!("\"{}\" is no image and no pattern of images", cut(text)), help)
            })?;
            Ok(text.to_owned())
        })
    })
}

fn formats(value: &Value<'_>) -> Option<Vec<Format>> {
    let mut formats = rule::each_format(value)?;
    if formats.is_empty() {
        return value
            .wrong(Wrong::new("no signature could count: `formats` is empty", "leave `formats` out to take all of them"));
    }
    let mut seen = HashSet::new();
    formats.retain(|format| seen.insert(*format));
    Some(formats)
}
