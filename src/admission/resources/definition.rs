use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};

use super::{GROUP, Kind, VERSION};
use crate::config::resource;

/// The two kinds, as a cluster is told of them: from the declarations that the configuration is read by.
#[must_use]
pub fn definitions() -> [CustomResourceDefinition; 2] {
    Kind::ALL.map(|kind| serde_json::from_value(definition(kind)).expect("a test makes both"))
}

/// Both as one manifest, for `kubectl apply`.
#[must_use]
pub fn manifest() -> String {
    let yaml = |definition| serde_saphyr::to_string(&definition).expect("it is texts, numbers and lists");
    let head = "# SecurityPolicy and Witness resources, as `countersign admission --crds` prints them.\n";
    definitions().into_iter().map(yaml).fold(head.to_owned(), |text, yaml| {
        let separator = if text == head { "" } else { "---\n" };
        format!("{text}{separator}{}\n", yaml.trim())
    })
}

fn definition(kind: Kind) -> Value {
    let (spec, columns) = match kind {
        Kind::SecurityPolicy => {
            (resource::policy_schema(), vec![("Enabled", "boolean", ".spec.enabled"), ("Mode", "string", ".spec.mode")])
        }
        Kind::Witness => (resource::witness_schema(), vec![("Description", "string", ".spec.description")]),
    };
    let description = spec["description"].clone();
    let ready = |member: &str| format!(".status.conditions[?(@.type==\"Ready\")].{member}");
    let mut columns: Vec<_> =
        columns.into_iter().map(|(name, kind, path)| json!({ "name": name, "type": kind, "jsonPath": path })).collect();
    columns.push(json!({ "name": "Ready", "type": "string", "jsonPath": ready("status") }));
    columns.push(json!({ "name": "Message", "type": "string", "jsonPath": ready("message"), "priority": 1 }));
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{}.{GROUP}", kind.plural()) },
        "spec": {
            "group": GROUP,
            "scope": "Cluster",
            "names": {
                "kind": kind.name(),
                "listKind": format!("{}List", kind.name()),
                "plural": kind.plural(),
                "singular": kind.name().to_lowercase(),
            },
            "versions": [{
                "name": VERSION,
                "served": true,
                "storage": true,
                "subresources": { "status": {} },
                "additionalPrinterColumns": columns,
                "schema": { "openAPIV3Schema": {
                    "type": "object",
                    "description": description,
                    "required": ["spec"],
                    "properties": { "spec": spec, "status": status() },
                }},
            }],
        },
    })
}

fn status() -> Value {
    let text = |description: &str| json!({ "type": "string", "description": description });
    let generation = json!({ "type": "integer", "format": "int64", "description": "The generation that this is about." });
    json!({
        "type": "object",
        "description": "What countersign makes of it.",
        "properties": {
            "observedGeneration": generation,
            "conditions": {
                "type": "array",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object",
                    "required": ["type", "status"],
                    "properties": {
                        "type": text("Ready."),
                        "status": text("True, or False: it cannot be used."),
                        "reason": text("InForce, NotEnabled, OtherCluster, Accepted or Refused."),
                        "message": text("What is wrong with it, and the cure."),
                        "observedGeneration": generation,
                        "lastTransitionTime": {
                            "type": "string",
                            "format": "date-time",
                            "description": "Since when the status is what it is.",
                        },
                    },
                },
            },
        },
    })
}
