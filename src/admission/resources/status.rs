use std::sync::Arc;

use jiff::{Timestamp, Unit};
use kube::api::DynamicObject;
use serde_json::{Value, json};

use super::Kind;

/// Characters of what is said of one resource.
const LONGEST: usize = 2000;

/// What is to be said of one resource: its condition `Ready`.
#[derive(Debug, Clone)]
pub struct State {
    pub kind: Kind,
    pub object: Arc<DynamicObject>,
    pub is_ready: bool,
    /// One word in CamelCase.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl State {
    pub(super) fn ready(kind: Kind, object: &Arc<DynamicObject>, reason: &'static str, message: &str) -> Self {
        Self { kind, object: object.clone(), is_ready: true, reason, message: message.to_owned() }
    }

    pub(super) fn refused(kind: Kind, object: &Arc<DynamicObject>, message: &str) -> Self {
        let message = message.chars().take(LONGEST).collect();
        Self { kind, object: object.clone(), is_ready: false, reason: "Refused", message }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        self.object.metadata.name.as_deref().unwrap_or_default()
    }

    /// A merge patch that gives the resource its status; None if it has it already. Replicas come to the same, so that the
    /// first one writes and the others find it written.
    #[must_use]
    pub fn patch(&self, now: Timestamp) -> Option<Value> {
        let generation = self.object.metadata.generation;
        let status = if self.is_ready { "True" } else { "False" };
        let before = &self.object.data["status"];
        let condition = before["conditions"].as_array().into_iter().flatten().find(|condition| condition["type"] == "Ready");
        let is_same = |condition: &Value| condition["status"] == status;
        if let Some(condition) = condition
            && is_same(condition)
            && condition["reason"] == self.reason
            && condition["message"] == self.message.as_str()
            && condition["observedGeneration"] == json!(generation)
            && before["observedGeneration"] == json!(generation)
        {
            return None;
        }
        let since = condition.filter(|condition| is_same(condition)).map(|condition| condition["lastTransitionTime"].clone());
        let since = since.filter(Value::is_string).unwrap_or_else(|| now.round(Unit::Second).unwrap_or(now).to_string().into());
        Some(json!({ "status": {
            "observedGeneration": generation,
            "conditions": [{
                "type": "Ready",
                "status": status,
                "reason": self.reason,
                "message": self.message,
                "observedGeneration": generation,
                "lastTransitionTime": since,
            }],
        }}))
    }
}
