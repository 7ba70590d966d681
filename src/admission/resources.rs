//! The cluster's `SecurityPolicy` and `Witness` resources: what they come to, and what each is told in its status.
//!
//! They are in force beside those of the configuration, and refer to each other by name. One that cannot be used harms no
//! other: a policy that would have denied closes its namespaces until it can be used, and its status says what is wrong.

mod definition;
mod given;
mod status;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use serde_json::Value;

pub use self::{
    definition::{definitions, manifest},
    given::Given,
    status::State,
};
use crate::{
    config::resource,
    kubernetes::{GROUP, Objects},
    policy::{self, Closed, Policies, Policy},
    verify::Known,
    witness::TrustedKeys,
};

const VERSION: &str = "v1";
/// What reviews are told of, as long as nothing is known.
const UNREAD: &str = "the SecurityPolicy and Witness resources of the cluster have not been read yet: try again in a moment";

/// One of the two kinds of resources. None is in a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    SecurityPolicy,
    Witness,
}

impl Kind {
    pub const ALL: [Self; 2] = [Self::SecurityPolicy, Self::Witness];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SecurityPolicy => "SecurityPolicy",
            Self::Witness => "Witness",
        }
    }

    #[must_use]
    pub fn plural(self) -> &'static str {
        match self {
            Self::SecurityPolicy => "securitypolicies",
            Self::Witness => "witnesses",
        }
    }

    #[must_use]
    pub fn api_resource(self) -> ApiResource {
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(GROUP, VERSION, self.name()), self.plural())
    }
}

/// What the cluster has; None where it was not read yet.
#[derive(Debug, Clone, Default)]
pub struct Kept {
    pub policies: Option<Arc<Objects>>,
    pub witnesses: Option<Arc<Objects>>,
}

/// What the configuration has, which resources cannot replace.
#[derive(Debug, Default)]
pub struct Beside<'a> {
    pub policies: HashSet<&'a str>,
    /// Each with why its signatures cannot be judged here, if so.
    pub witnesses: HashMap<&'a str, Option<String>>,
    /// The cluster that policies are to be taken of.
    pub cluster: Option<&'a str>,
}

/// What the resources of a cluster come to.
#[derive(Debug, Default)]
pub struct Resources {
    pub policies: Vec<Policy>,
    pub closed: Vec<Closed>,
    /// By name, each with the `spec` that it was read from.
    pub witnesses: BTreeMap<String, (Known, Value)>,
    /// None: they have not been read yet.
    pub states: Option<Vec<State>>,
}

impl Resources {
    #[must_use]
    pub fn read(kept: &Kept, beside: &Beside<'_>) -> Self {
        let (Some(policies), Some(witnesses)) = (&kept.policies, &kept.witnesses) else {
            let everywhere = Closed { name: "(resources)".to_owned(), namespaces: vec!["*".to_owned()], reason: UNREAD.into() };
            return Self { closed: vec![everywhere], ..Self::default() };
        };
        let (mut this, mut states) = (Self::default(), vec![]);
        let mut unusable: HashMap<&str, Option<String>> = beside.witnesses.clone();
        for (name, object) in &**witnesses {
            let read = if beside.witnesses.contains_key(name.as_str()) {
                Err("a [[witness]] of the configuration has this name, and counts instead: choose another name".to_owned())
            } else {
                known(name, spec(object))
            };
            let state = match read {
                Ok(known) => {
                    unusable.insert(name, None);
                    this.witnesses.insert(name.clone(), (known, spec(object).clone()));
                    State::ready(Kind::Witness, object, "Accepted", "its keys are known")
                }
                Err(problem) => {
                    let why = format!("witness {name} cannot be used: {problem}");
                    unusable.entry(name).or_insert(Some(why));
                    State::refused(Kind::Witness, object, &problem)
                }
            };
            states.push(state);
        }
        for (name, object) in &**policies {
            let state = match this.take_policy(name, spec(object), beside, &unusable) {
                Ok((reason, message)) => State::ready(Kind::SecurityPolicy, object, reason, message),
                Err(problem) => State::refused(Kind::SecurityPolicy, object, &this.close(name, spec(object), problem, beside)),
            };
            states.push(state);
        }
        this.states = Some(states);
        this
    }

    fn take_policy(
        &mut self,
        name: &str,
        spec: &Value,
        beside: &Beside<'_>,
        unusable: &HashMap<&str, Option<String>>,
    ) -> Result<(&'static str, &'static str), String> {
        if beside.policies.contains(name) {
            return Err("a [[policy]] of the configuration has this name: choose another name".to_owned());
        }
        let names: Vec<&str> = unusable.keys().copied().collect();
        let policy = resource::policy(name, spec, &names)?;
        if !policy.enabled {
            return Ok(("NotEnabled", "it is not enabled, and demands nothing"));
        }
        if !policy.is_for(beside.cluster).map_err(|error| error.to_string())? {
            return Ok(("OtherCluster", "it is for other clusters than this"));
        }
        if let Some(why) = policy.witnesses.iter().find_map(|witness| unusable.get(witness.as_str())?.clone()) {
            return Err(why);
        }
        Policies::new([policy.clone()], beside.cluster).map_err(|error| error.to_string())?;
        self.policies.push(policy);
        Ok(("InForce", "it is in force"))
    }

    /// Nothing is admitted where a policy would have denied, had it been right. Returns what is said of it.
    fn close(&mut self, name: &str, spec: &Value, problem: String, beside: &Beside<'_>) -> String {
        let namespaces = closed_namespaces(spec, beside.cluster);
        if namespaces.is_empty() {
            return problem;
        }
        let stop = if problem.ends_with('?') { "" } else { "." };
        let said = format!("{problem}{stop} Until that is mended, nothing is admitted to {}", namespaces.join(", "));
        self.closed.push(Closed { name: name.to_owned(), namespaces, reason: problem.into() });
        said
    }
}

fn spec(object: &DynamicObject) -> &Value {
    object.data.get("spec").unwrap_or(&Value::Null)
}

fn known(name: &str, spec: &Value) -> Result<Known, String> {
    let given = resource::witness(name, spec)?;
    let keys = TrustedKeys::with_own(name, &given.verify, Some(&given.public_key)).map_err(|error| super::why::chain(&error))?;
    Ok(Known { witness: name.to_owned(), keys, certificates: given.certificate.into_iter().collect() })
}

/// The namespaces that a policy is about which cannot be used, if it is enabled, enforced, and may be for this cluster.
fn closed_namespaces(spec: &Value, cluster: Option<&str>) -> Vec<String> {
    let is_off = matches!(spec["enabled"], Value::Null | Value::Bool(false));
    let is_mild = spec["mode"] == "warn" || spec["mode"] == "audit";
    if is_off || is_mild || is_elsewhere(spec, cluster) {
        return vec![];
    }
    let mut namespaces = texts(spec, "namespace", "namespaces");
    namespaces.retain(|namespace| policy::glob(namespace).is_ok());
    namespaces
}

/// Whether it is certain that the policy is for other clusters.
fn is_elsewhere(spec: &Value, cluster: Option<&str>) -> bool {
    let clusters = texts(spec, "cluster", "clusters");
    let policy = Policy { clusters: clusters.clone(), ..Policy::new("", "", "") };
    !clusters.is_empty() && policy.is_for(cluster).is_ok_and(|is_for| !is_for)
}

fn texts(spec: &Value, one: &str, several: &str) -> Vec<String> {
    let listed = spec[several].as_array().into_iter().flatten();
    listed.chain([&spec[one]]).filter_map(Value::as_str).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests;
