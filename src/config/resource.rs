//! Policies and witnesses that a cluster keeps as custom resources: declared, read and refused as those of the file are.
//!
//! A resource's `spec` has the keys of its section, in camelCase and without the `name`, which is the resource's own. It is
//! written as TOML and read as a section, so that there is one grammar and one set of messages.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use serde_json::{Map, Value, json};

use super::{
    names::Names,
    outside::Outside,
    policy,
    problem::{self, Severity},
    reader::Section,
    report::{Report, cut},
    schema,
    shape::{Key, Kind, Presence, Table, nearest},
    syntax, witness,
};
use crate::policy::Policy;

pub use super::witness::Given as GivenWitness;

/// Reads the `spec` of a `SecurityPolicy`. `witnesses` are the names that there are.
///
/// # Errors
/// All that is wrong with it, on one line.
pub fn policy(name: &str, spec: &Value, witnesses: &[&str]) -> Result<Policy, String> {
    read(&policy::TABLE, name, spec, Names::of_witnesses(witnesses), policy::read)
}

/// Reads the `spec` of a `Witness`.
///
/// # Errors
/// All that is wrong with it, on one line.
pub fn witness(name: &str, spec: &Value) -> Result<GivenWitness, String> {
    read(&witness::GIVEN, name, spec, Names::default(), witness::read_given)
}

/// The `openAPIV3Schema` of a `spec`, which a cluster holds resources to before they are read here.
#[must_use]
pub fn policy_schema() -> Value {
    let mut schema = structural(&policy::TABLE);
    let one_of = |one: &str, several: &str| json!({ "oneOf": [{ "required": [one] }, { "required": [several] }] });
    schema["allOf"] = json!([
        one_of("witness", "witnesses"),
        one_of("namespace", "namespaces"),
        { "not": { "required": ["cluster", "clusters"] } },
    ]);
    schema["description"] = json!("Which images may run where. Where several hold, each has to be met.");
    for several in ["witnesses", "namespaces", "clusters"] {
        schema["properties"][several]["minItems"] = json!(1);
    }
    schema
}

/// The same of a `Witness`.
#[must_use]
pub fn witness_schema() -> Value {
    structural(&witness::GIVEN)
}

fn read<T>(
    shape: &'static Table,
    name: &str,
    spec: &Value,
    names: Names,
    read: impl Fn(&Section<'_>) -> Option<T>,
) -> Result<T, String> {
    let Value::Object(spec) = spec else { return Err("it has no `spec`".to_owned()) };
    let mut section = to_toml(shape, spec)?;
    section.insert("name".to_owned(), name.into());
    let text = toml::to_string(&section).map_err(|error| format!("its `spec` cannot be read: {error}"))?;
    let mut report = Report::new(problem::Source::new(&text, Path::new(name)), Outside::machine(Path::new("")));
    let document = syntax::document(&text, &mut report);
    report.names = names;
    let found = read(&Section::new(&report, shape, Cow::Borrowed(&document), 0..0));
    let problems = report.into_problems().into_iter().filter(|problem| problem.severity == Severity::Error);
    let said: Vec<_> = problems
        .map(|problem| {
            let message = match field(&text, &problem) {
                Some(field) => format!("`{field}`: {}", problem.message),
                None => problem.message,
            };
            problem.help.map_or_else(|| message.clone(), |help| format!("{message}: {help}"))
        })
        .collect();
    match found {
        Some(found) if said.is_empty() => Ok(found),
        _ => Err(in_words_of_resources(&said.join("; "))),
    }
}

/// The key that a problem is with, such as `verify[0].until`; None if the message names it itself. `text` has a key a line.
fn field(text: &str, problem: &problem::Problem) -> Option<String> {
    let place = problem.place.as_ref()?;
    let mut lists: BTreeMap<&str, usize> = BTreeMap::new();
    let mut table = String::new();
    for line in text.lines().take(place.line) {
        if let Some(list) = line.strip_prefix("[[").and_then(|line| line.strip_suffix("]]")) {
            let count = lists.entry(list).or_default();
            table = format!("{}[{count}].", camel(list));
            *count += 1;
        }
    }
    let key = text.lines().nth(place.line - 1)?.split_once(" = ").map_or("", |(key, _)| key);
    let is_named = problem.message.contains(&format!("`{key}`")) || (place.column == 1 && problem.message.contains('`'));
    if key.is_empty() || is_named {
        (!table.is_empty()).then(|| table.trim_end_matches('.').to_owned())
    } else {
        Some(table + &camel(key))
    }
}

fn to_toml(shape: &Table, object: &Map<String, Value>) -> Result<toml::Table, String> {
    let mut table = toml::Table::new();
    for (name, value) in object {
        let key =
            shape.current_keys().find(|key| is_shown(key) && camel(key.name) == *name).ok_or_else(|| unknown(shape, name))?;
        if let Some(value) = convert(&key.kind, value)? {
            table.insert(key.name.to_owned(), value);
        }
    }
    Ok(table)
}

/// What a value of another type than the key's is, the section's reader says.
fn convert(kind: &Kind, value: &Value) -> Result<Option<toml::Value>, String> {
    Ok(Some(match (value, kind) {
        (Value::Null, _) => return Ok(None),
        (Value::Object(object), Kind::Table(shape) | Kind::Tables(shape)) => toml::Value::Table(to_toml(shape, object)?),
        (Value::Object(_), _) => toml::Value::Table(toml::Table::new()),
        (Value::Array(elements), kind) => {
            let kind = if let Kind::List(element) = kind { element } else { kind };
            let converted: Vec<_> = elements.iter().map(|element| convert(kind, element)).collect::<Result<_, _>>()?;
            toml::Value::Array(converted.into_iter().flatten().collect())
        }
        (Value::String(text), Kind::Time) => text.parse().map_or_else(|_| text.as_str().into(), toml::Value::Datetime),
        (Value::String(text), _) => text.as_str().into(),
        (Value::Bool(flag), _) => (*flag).into(),
        (Value::Number(number), _) => match number.as_i64() {
            Some(integer) => integer.into(),
            None => number.as_f64().unwrap_or(f64::NAN).into(),
        },
    }))
}

fn unknown(shape: &Table, name: &str) -> String {
    let known: Vec<_> = shape.current_keys().filter(|key| is_shown(key)).map(|key| camel(key.name)).collect();
    let help = match nearest(name, known.iter().map(String::as_str)) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("there are {}", known.join(", ")),
    };
    format!("unknown key `{}`: {help}", cut(name))
}

/// A structural schema: every key with its type, and nothing that the API server would not keep.
fn structural(shape: &Table) -> Value {
    let keys = || shape.current_keys().filter(|key| is_shown(key));
    let properties: Map<String, Value> = keys().map(|key| (camel(key.name), property(key))).collect();
    let required: Vec<_> = keys().filter(|key| key.presence == Presence::Required).map(|key| camel(key.name)).collect();
    let mut schema = json!({ "type": "object", "description": in_words_of_resources(shape.doc), "properties": properties });
    if !required.is_empty() {
        schema["required"] = required.into();
    }
    schema
}

fn property(key: &Key) -> Value {
    let mut description = vec![key.doc.to_owned()];
    if let Kind::Choice(choice) | Kind::List(Kind::Choice(choice)) = &key.kind {
        description.extend(choice.words.iter().map(|word| format!("{}: {}", word.text, word.doc)));
    }
    if key.presence == Presence::Defaulted {
        description.push(format!("If absent, {}.", key.example));
    }
    let mut schema = of_kind(&key.kind);
    schema["description"] = in_words_of_resources(&description.join(" ")).into();
    schema
}

fn of_kind(kind: &Kind) -> Value {
    match kind {
        Kind::Choice(_) => {
            let mut schema = schema::kind(kind);
            schema["type"] = "string".into();
            schema
        }
        Kind::List(element) => json!({ "type": "array", "items": of_kind(element) }),
        Kind::Table(shape) => structural(shape),
        Kind::Tables(shape) => json!({ "type": "array", "items": structural(shape) }),
        kind => schema::kind(kind),
    }
}

/// A resource's name stands in its metadata.
fn is_shown(key: &Key) -> bool {
    key.name != "name"
}

fn camel(name: &str) -> String {
    let mut words = name.split('_');
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |text, word| {
        let (initial, rest) = word.split_at(1);
        text + &initial.to_uppercase() + rest
    })
}

/// Sections and keys as they are called in resources.
fn in_words_of_resources(text: &str) -> String {
    let sections = [("a [[policy]]", "a SecurityPolicy"), ("[[policy]]", "the SecurityPolicy"), ("[[witness]]", "Witness")];
    let text = sections.iter().fold(text.to_owned(), |text, (section, kind)| text.replace(section, kind));
    let keys = [&policy::TABLE, &witness::GIVEN].into_iter().flat_map(Table::current_keys).map(|key| (key.name, camel(key.name)));
    keys.fold(text, |text, (key, camel)| {
        // Examples are YAML there.
        text.replace(&format!("`{key}`"), &format!("`{camel}`")).replace(&format!(" {key} = "), &format!(" {camel}: "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        policy::{Mode, SignedAs},
        signature::Format,
    };

    const PEM: &str = include_str!("../../tests/data/vectors/keys/p256.pub.pem");

    #[test]
    fn a_policy_is_what_the_same_section_of_the_file_is() {
        let spec = json!({
            "witnesses": ["release", "security"], "clusters": ["prod-*"], "namespace": "payments", "enabled": true, "mode": "warn",
            "note": "Agreed", "formats": ["bundle"], "signedAs": "tag", "throughIndex": true, "maxAge": "90d", "tags": "resolve",
            "allow": ["registry.example.com/tools/**"],
        });
        let from_resource = policy("payments", &spec, &["release", "security"]).unwrap();
        let file = "[[witness]]\nname = \"release\"\nkey = \"awskms:///alias/a?region=eu-west-1\"\n\
                    [[witness]]\nname = \"security\"\nkey = \"awskms:///alias/b?region=eu-west-1\"\n\
                    [[policy]]\nname = \"payments\"\nwitnesses = [\"release\", \"security\"]\nclusters = [\"prod-*\"]\n\
                    namespace = \"payments\"\nenabled = true\nmode = \"warn\"\nnote = \"Agreed\"\nformats = [\"bundle\"]\n\
                    signed_as = \"tag\"\nthrough_index = true\nmax_age = \"90d\"\ntags = \"resolve\"\n\
                    allow = [\"registry.example.com/tools/**\"]\n";
        let (config, _) = super::super::Config::parse(file, Path::new("test.toml")).unwrap();
        assert_eq!(config.policies, std::slice::from_ref(&from_resource));
        assert_eq!((from_resource.mode, from_resource.signed_as), (Mode::Warn, SignedAs::Tag));
        assert_eq!(from_resource.formats, [Format::Bundle]);
        assert!(!policy("p", &json!({"witness": "release", "namespace": "*", "note": null}), &["release"]).unwrap().enabled);
    }

    #[test]
    fn what_is_wrong_is_said_in_the_words_of_resources() {
        let refused = |spec: Value| policy("payments", &spec, &["release"]).unwrap_err();
        assert_eq!(refused(Value::Null), "it has no `spec`");
        let good = json!({"witness": "release", "namespace": "payments"});
        for (key, value, expected) in [
            ("witness", json!("relaese"), "`witness`: no Witness is named \"relaese\": did you mean \"release\"?"),
            ("maxAge", json!("9 weeks"), "`maxAge`: \"9 weeks\" is no length of time"),
            ("signedAs", json!("nothing"), "`signedAs`"),
            ("signed_as", json!("tag"), "unknown key `signed_as`: did you mean `signedAs`?"),
            ("name", json!("other"), "unknown key `name`"),
            ("enabled", json!("true"), "`enabled` is true or false"),
            ("allow", json!(["["]), "is no image and no pattern"),
            ("allow", json!({"a": 1}), "`allow` is a list"),
            ("namespace", json!("team-["), "is no name and no pattern of names"),
        ] {
            let mut spec = good.clone();
            spec[key] = value;
            let said = refused(spec);
            assert!(said.contains(expected), "{key}: {said}");
            assert!(!said.contains("[[") && !said.contains('\n'), "{said}");
        }
        let late = refused(json!({"witness": "release", "namespace": "payments", "maxAge": "9 weeks"}));
        assert!(late.ends_with("for example maxAge: \"90d\""), "{late}");
        let two = refused(json!({"witness": "release", "mode": "hard", "maxAge": "1"}));
        assert!(two.contains("`mode`") && two.contains("length of time") && two.contains("namespace"), "{two}");
    }

    #[test]
    fn a_witness_is_public_keys_and_when_they_count() {
        let spec = json!({
            "description": "Signs", "publicKey": PEM,
            "verify": [{"key": PEM, "until": "2027-03-01T00:00:00Z", "revoked": "2026-12-24T03:00:00+01:00", "reason": "lost"}],
        });
        let given = witness("release", &spec).unwrap();
        assert_eq!(given.verify.len(), 1);
        assert_eq!(given.verify[0].until, Some("2027-03-01T00:00:00Z".parse().unwrap()));
        assert_eq!(given.verify[0].revoked, Some(("2026-12-24T02:00:00Z".parse().unwrap(), "lost".to_owned())));
        for (spec, expected) in [
            (json!({}), "`publicKey`"),
            (json!({"publicKey": "no"}), "it is not PEM"),
            (
                json!({"publicKey": PEM, "verify": [{"key": PEM}, {"key": PEM, "until": "soon"}]}),
                "`verify[1]`: `until` is a date and time",
            ),
            (json!({"publicKey": PEM, "verify": [{"key": "no"}]}), "`verify[0].key`: "),
            (json!({"publicKey": PEM, "key": "awskms:///x"}), "unknown key `key`"),
        ] {
            let said = witness("release", &spec).unwrap_err();
            assert!(said.contains(expected), "{spec}: {said}");
        }
    }

    #[test]
    fn schemas_are_structural_and_have_every_key() {
        fn visit(schema: &Value) {
            assert!(schema["type"].is_string(), "{schema}");
            for absent in ["additionalProperties", "examples", "default", "$schema", "anyOf"] {
                assert!(schema.get(absent).is_none(), "{absent}: {schema}");
            }
            schema["properties"].as_object().into_iter().flatten().for_each(|(_, property)| visit(property));
            if let Some(items) = schema.get("items") {
                visit(items);
            }
        }
        for schema in [policy_schema(), witness_schema()] {
            visit(&schema);
        }
        let policy = policy_schema();
        assert_eq!(policy["properties"]["mode"]["enum"], json!(["enforce", "warn", "audit"]));
        assert_eq!(policy["properties"].as_object().unwrap().len(), policy::TABLE.current_keys().count() - 1);
        assert_eq!(witness_schema()["required"], json!(["publicKey"]));
    }
}
