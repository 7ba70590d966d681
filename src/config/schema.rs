//! The JSON Schema that editors check and complete a configuration with, from the declarations.

use serde_json::{Map, Value, json};
use toml::de::DeValue;

use super::{
    ROOT,
    shape::{Grammar, Key, Kind, Presence, Table},
    units,
};

/// The JSON Schema (draft 2020-12) of a configuration file. It is never narrower than what is read: what a schema cannot say,
/// such as whether a reference resolves, only reading the file finds out.
#[must_use]
pub fn schema() -> Value {
    let mut schema = table(&ROOT);
    let members = schema.as_object_mut().expect("a table's schema is an object");
    members.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
    members.insert("title".to_owned(), json!("countersign"));
    schema
}

fn table(shape: &Table) -> Value {
    let properties: Map<String, Value> = shape.current_keys().map(|key| (key.name.to_owned(), property(key))).collect();
    let required: Vec<_> = shape.current_keys().filter(|key| key.presence == Presence::Required).map(|key| key.name).collect();
    json!({
        "type": "object",
        "description": shape.doc,
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

fn property(key: &Key) -> Value {
    let mut schema = kind(&key.kind);
    let members = schema.as_object_mut().expect("every kind's schema is an object");
    let mut description = vec![key.doc.to_owned()];
    if let Kind::Choice(choice) | Kind::List(Kind::Choice(choice)) = &key.kind {
        description.extend(choice.words.iter().map(|word| format!("\"{}\": {}", word.text, word.doc)));
    }
    members.insert("description".to_owned(), description.join("\n\n").into());
    match (&key.kind, key.presence) {
        // Their members have their own.
        (Kind::Tables(_), _) | (Kind::Table(_), Presence::Defaulted) => {}
        (_, Presence::Defaulted) => {
            members.insert("default".to_owned(), as_json(key.example));
        }
        _ => {
            members.insert("examples".to_owned(), json!([as_json(key.example)]));
        }
    }
    schema
}

pub(super) fn kind(kind: &Kind) -> Value {
    match kind {
        Kind::Text(Grammar { pattern: None, .. }) => json!({ "type": "string" }),
        Kind::Text(Grammar { pattern: Some(pattern), .. }) => json!({ "type": "string", "pattern": pattern }),
        Kind::Flag => json!({ "type": "boolean" }),
        Kind::Count { least, most } => json!({ "type": "integer", "minimum": least, "maximum": most }),
        Kind::Duration { .. } => json!({ "type": "string", "pattern": units::DURATION_PATTERN }),
        Kind::Size { .. } => json!({ "type": "string", "pattern": units::SIZE_PATTERN }),
        Kind::Time => json!({ "type": "string", "format": "date-time" }),
        Kind::Path => json!({ "type": "string", "minLength": 1 }),
        Kind::Secret => secret(&json!({ "type": "string", "minLength": 1 })),
        Kind::Url(grammar) => secret(&json!({ "type": "string", "pattern": grammar.pattern })),
        Kind::Choice(choice) => json!({ "enum": choice.words.iter().map(|word| word.text).collect::<Vec<_>>() }),
        Kind::List(element) => json!({ "type": "array", "items": self::kind(element) }),
        Kind::Table(shape) => table(shape),
        Kind::Tables(shape) => json!({ "type": "array", "items": table(shape) }),
    }
}

/// A reference with exactly one member, or the secret itself, which is such a text.
fn secret(text: &Value) -> Value {
    let mut reference = table(&super::secret::REFERENCE);
    let members = reference.as_object_mut().expect("a table's schema is an object");
    members.insert("minProperties".to_owned(), json!(1));
    members.insert("maxProperties".to_owned(), json!(1));
    json!({ "anyOf": [reference, text] })
}

/// A declared example in JSON; times become texts, as `"format": "date-time"` has them.
fn as_json(example: &str) -> Value {
    let value = DeValue::parse(example).expect("a test reads every example");
    to_json(value.get_ref())
}

fn to_json(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => text.as_ref().into(),
        DeValue::Integer(number) => number.as_str().parse::<i64>().map_or(Value::Null, Value::from),
        DeValue::Float(number) => number.as_str().parse::<f64>().map_or(Value::Null, Value::from),
        DeValue::Boolean(flag) => (*flag).into(),
        DeValue::Datetime(time) => time.to_string().into(),
        DeValue::Array(array) => array.iter().map(|element| to_json(element.get_ref())).collect(),
        DeValue::Table(table) => {
            table.iter().map(|(key, value)| (key.get_ref().to_string(), to_json(value.get_ref()))).collect::<Map<_, _>>().into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every object in the schema, with its path.
    fn visit(path: &str, schema: &Value, see: &mut impl FnMut(&str, &Value)) {
        see(path, schema);
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            visit(&format!("{path}.{name}"), property, see);
        }
        for nested in [&schema["items"], &schema["anyOf"][0]] {
            if nested.is_object() {
                visit(path, nested, see);
            }
        }
    }

    #[test]
    fn editors_are_told_of_every_key_and_refuse_all_others() {
        let mut keys = Vec::new();
        visit("", &schema(), &mut |path, schema| {
            if schema["type"] == "object" {
                assert_eq!(schema["additionalProperties"], false, "{path}");
            }
            assert!(
                path.is_empty()
                    || schema["description"].is_string()
                    || schema.get("pattern").is_some()
                    || schema.get("enum").is_some(),
                "{path}"
            );
            keys.push(path.to_owned());
        });
        for key in [
            ".server.grace",
            ".server.tls.key.file",
            ".queue.retry.give_up",
            ".queue.tls.key.file",
            ".witness.verify.until",
            ".rule.exclude",
            ".policy.allow",
            ".admission.kinds.paths",
        ] {
            assert!(keys.iter().any(|path| path == key), "{key}");
        }
        assert!(!keys.iter().any(|path| path == ".source.hmac"), "it is of a later version");
    }

    #[test]
    fn defaults_and_required_keys_are_those_of_the_reader() {
        let schema = schema();
        assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
        assert_eq!(schema["properties"]["server"]["properties"]["max_requests"]["default"], 256);
        assert_eq!(schema["properties"]["queue"]["properties"]["retry"]["properties"]["first"]["default"], "1s");
        let rule = &schema["properties"]["rule"]["items"];
        assert_eq!(rule["required"], json!(["name", "scope", "witness", "algorithm"]));
        assert_eq!(rule["properties"]["formats"]["default"], json!(["cosign", "bundle"]));
        assert_eq!(rule["properties"]["created"]["examples"], json!(["2026-11-21T09:00:00Z"]));
    }
}
