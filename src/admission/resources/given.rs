//! Resources in files, before a cluster has them: CI judges manifests by the policies that will be applied, too.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use kube::api::DynamicObject;

use super::{Kept, Kind, State, VERSION, spec};
use crate::{
    admission::{manifest::Object, shown},
    kubernetes::{GROUP, Objects},
};

/// The resources among the objects of manifests, each with where it stands.
#[derive(Debug, Default)]
pub struct Given {
    policies: Objects,
    witnesses: Objects,
    places: BTreeMap<(Kind, String), String>,
}

impl Given {
    /// Takes the object if it is a resource of ours; false if it is anything else. The same resource may come twice.
    ///
    /// # Errors
    /// What is wrong with it, and where it stands.
    pub fn take(&mut self, file: &Path, object: &Object) -> Result<bool, String> {
        if object.kind.group != GROUP {
            return Ok(false);
        }
        let kind = shown(&object.kind.kind);
        let place = format!("{}: {}: {kind} {}", file.display(), object.place(), shown(&object.name));
        let wrong = |problem: String| Err(format!("{place}: {problem}"));
        let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == object.kind.kind) else {
            return wrong(format!("`kind`: {GROUP} has no kind {kind}: there are SecurityPolicy and Witness"));
        };
        if object.version != VERSION {
            return wrong(format!("`apiVersion`: there is no version {:?}: write {GROUP}/{VERSION}", shown(&object.version)));
        }
        let resource: DynamicObject = match serde_json::from_str(object.content.get()) {
            Ok(resource) => resource,
            Err(error) => return wrong(format!("`metadata`: {error}")),
        };
        let Some(name) = resource.metadata.name.clone().filter(|name| !name.is_empty()) else {
            return wrong("`metadata.name` is missing".to_owned());
        };
        let resources = match kind {
            Kind::SecurityPolicy => &mut self.policies,
            Kind::Witness => &mut self.witnesses,
        };
        if let Some(known) = resources.get(&name)
            && spec(known) != spec(&resource)
        {
            return wrong(format!("there is another one of this name: {}", self.places[&(kind, name)]));
        }
        resources.insert(name.clone(), Arc::new(resource));
        self.places.entry((kind, name)).or_insert(place);
        Ok(true)
    }

    /// As a cluster would have them.
    #[must_use]
    pub fn kept(&self) -> Kept {
        Kept { policies: Some(Arc::new(self.policies.clone())), witnesses: Some(Arc::new(self.witnesses.clone())) }
    }

    /// What is wrong with a resource, and where it stands; None if nothing is.
    #[must_use]
    pub fn refusal(&self, state: &State) -> Option<String> {
        let place = self.places.get(&(state.kind, state.name().to_owned()))?;
        (!state.is_ready).then(|| format!("{place}: {}", state.message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::{
        manifest,
        resources::{Beside, Resources},
    };

    fn take(given: &mut Given, text: &str) -> Vec<Result<bool, String>> {
        manifest::objects(text).unwrap().iter().map(|object| given.take(Path::new("ours.yaml"), object)).collect()
    }

    fn policy(name: &str, spec: &str) -> String {
        format!("apiVersion: countersign.dev/v1\nkind: SecurityPolicy\nmetadata: {{name: {name}}}\nspec: {spec}\n")
    }

    #[test]
    fn resources_are_read_as_those_of_a_cluster_and_what_is_wrong_is_said_with_file_document_and_field() {
        let pem = include_str!("../../../tests/data/vectors/keys/p256.pub.pem").trim_end().replace('\n', "\n    ");
        let witness = format!(
            "apiVersion: countersign.dev/v1\nkind: Witness\nmetadata: {{name: release}}\nspec:\n  publicKey: |\n    {pem}\n"
        );
        let good = policy("payments", "{witness: release, namespace: payments, enabled: true}");
        let late = policy("shop", "{witness: release, namespace: shop, enabled: true, maxAge: soon}");
        let other = "apiVersion: v1\nkind: Namespace\nmetadata: {name: payments}\n";
        let mut given = Given::default();
        let taken = take(&mut given, &[&witness, &good, other, &late, &good].join("---\n"));
        assert_eq!(taken, [Ok(true), Ok(true), Ok(false), Ok(true), Ok(true)]);
        let resources = Resources::read(&given.kept(), &Beside::default());
        assert_eq!(resources.policies.iter().map(|policy| policy.name.as_str()).collect::<Vec<_>>(), ["payments"]);
        let refused: Vec<_> = resources.states.iter().flatten().filter_map(|state| given.refusal(state)).collect();
        assert_eq!(refused.len(), 1);
        let expected = "ours.yaml: document 4: SecurityPolicy shop: `maxAge`: \"soon\" is no length of time";
        assert!(refused[0].starts_with(expected), "{refused:?}");
    }

    #[test]
    fn what_is_no_resource_of_ours_although_it_says_so_is_an_error() {
        let mut given = Given::default();
        let mut wrong = |text: &str| take(&mut given, text).remove(0).unwrap_err();
        let good = policy("p", "{witness: w, namespace: n}");
        assert_eq!(
            wrong(&good.replace("SecurityPolicy", "SecurityPolice")),
            "ours.yaml: document 1: SecurityPolice p: `kind`: countersign.dev has no kind SecurityPolice: there are \
             SecurityPolicy and Witness"
        );
        assert!(
            wrong(&good.replace("/v1", "/v2")).ends_with("`apiVersion`: there is no version \"v2\": write countersign.dev/v1")
        );
        assert!(wrong(&good.replace("{name: p}", "{}")).ends_with("`metadata.name` is missing"));
        assert!(wrong(&good.replace("{name: p}", "{name: p, labels: 7}")).contains("`metadata`: "));
        assert_eq!(take(&mut given, &good), [Ok(true)]);
        let other = take(&mut given, &good.replace("namespace: n", "namespace: m")).remove(0).unwrap_err();
        assert!(
            other.ends_with("SecurityPolicy p: there is another one of this name: ours.yaml: document 1: SecurityPolicy p"),
            "{other}"
        );
    }
}
