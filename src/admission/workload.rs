//! What an object would run: its images, wherever its kind keeps pods.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::review::{GroupKind, Replace};

/// The annotation that lets somebody past all policies.
pub const BREAKGLASS: &str = "countersign.dev/breakglass";

/// Secrets and service accounts of one object that are taken note of.
const MOST_SECRETS: usize = 16;
/// Pod templates of one object that are looked at; more are an error.
const MOST_TEMPLATES: usize = 1000;

/// Where each kind keeps its pod templates.
#[derive(Debug, Clone)]
pub struct Kinds(HashMap<GroupKind, Vec<Vec<String>>>);

/// What one object would run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Workload {
    pub images: Vec<Image>,
    /// Each different value of the breakglass annotation, of the object and of its templates.
    pub breakglass: Vec<String>,
    /// Whether it is a template that pods are made from, and not itself one.
    pub is_template: bool,
    pub pulled_with: PulledWith,
}

/// What a node logs in with to pull the images of an object. Names in the object's namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PulledWith {
    /// Secrets.
    pub secrets: Vec<String>,
    /// Service accounts of pods that name no secrets: those of the account count then.
    pub accounts: Vec<String>,
}

impl PulledWith {
    /// Those of another object beside these, as many as are taken note of.
    pub fn add(&mut self, other: &Self) {
        for (names, others) in [(&mut self.secrets, &other.secrets), (&mut self.accounts, &other.accounts)] {
            for name in others {
                note(names, name.clone());
            }
        }
    }
}

/// One image that an object names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Where it stands: a JSON pointer (RFC 6901).
    pub pointer: String,
    /// What is to have it, such as `container web`.
    pub what: String,
    /// As it was written.
    pub text: String,
}

/// Why it cannot be told what an object would run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the object is not what its kind says")]
    Malformed(#[source] serde_json::Error),
    #[error("the object has more than {MOST_TEMPLATES} pod templates")]
    TooMany,
}

impl Default for Kinds {
    fn default() -> Self {
        Self::new([])
    }
}

impl Kinds {
    /// Kubernetes' own kinds, and further ones: group, kind, and the paths to their pod templates.
    pub fn new(custom: impl IntoIterator<Item = (GroupKind, Vec<Vec<String>>)>) -> Self {
        let path = |path: &[&str]| path.iter().map(|&segment| segment.to_owned()).collect::<Vec<_>>();
        let own = [
            ("", "Pod", path(&[])),
            ("", "ReplicationController", path(&["spec", "template"])),
            ("apps", "Deployment", path(&["spec", "template"])),
            ("apps", "ReplicaSet", path(&["spec", "template"])),
            ("apps", "StatefulSet", path(&["spec", "template"])),
            ("apps", "DaemonSet", path(&["spec", "template"])),
            ("batch", "Job", path(&["spec", "template"])),
            ("batch", "CronJob", path(&["spec", "jobTemplate", "spec", "template"])),
        ];
        let own = own.map(|(group, kind, path)| (GroupKind { group: group.to_owned(), kind: kind.to_owned() }, vec![path]));
        let mut kinds: HashMap<_, _> = custom.into_iter().collect();
        // Nothing that is configured makes a pod something else.
        kinds.extend(own);
        Self(kinds)
    }

    /// What this object would run; None if its kind is not known to run anything.
    pub fn read(&self, kind: &GroupKind, object: &RawValue) -> Result<Option<Workload>, Error> {
        let mut workload = Workload::default();
        // Kubernetes before 1.22 asked about ephemeral containers with an object of their own.
        if kind.group.is_empty() && kind.kind == "EphemeralContainers" {
            add_spec(&members(object)?, "", &mut workload)?;
            return Ok(Some(workload));
        }
        let Some(paths) = self.0.get(kind) else { return Ok(None) };
        workload.is_template = paths.iter().any(|path| !path.is_empty());
        add_annotation(&members(object)?, &mut workload)?;
        let mut found = vec![];
        for path in paths {
            walk(object, path, String::new(), &mut found)?;
        }
        for (pointer, template) in found {
            let template = members(template)?;
            add_annotation(&template, &mut workload)?;
            if let Some(spec) = member(&template, "spec") {
                add_spec(&members(spec)?, &format!("{pointer}/spec"), &mut workload)?;
            }
        }
        Ok(Some(workload))
    }
}

impl Workload {
    /// The images that are not in `before` where they are now. A running pod's containers are there already, so of a pod only
    /// what is changed counts; what is made from a template is made anew, so if anything of it is changed all of it counts.
    #[must_use]
    pub fn changed_since(&self, before: &Self) -> Vec<Image> {
        let had: std::collections::HashSet<(&str, &str)> =
            before.images.iter().map(|image| (image.what.as_str(), image.text.as_str())).collect();
        let is_new = |image: &&Image| !had.contains(&(image.what.as_str(), image.text.as_str()));
        if self.is_template && self.images.iter().any(|image| is_new(&image)) {
            return self.images.clone();
        }
        self.images.iter().filter(is_new).cloned().collect()
    }
}

impl Image {
    /// What pins it to `value`.
    #[must_use]
    pub fn replaced_by(&self, value: String) -> Replace {
        Replace { path: self.pointer.clone(), value }
    }
}

/// Finds every value at `path` below `value`, with its pointer.
fn walk<'a>(value: &'a RawValue, path: &[String], pointer: String, found: &mut Vec<(String, &'a RawValue)>) -> Result<(), Error> {
    let Some((segment, rest)) = path.split_first() else {
        if found.len() == MOST_TEMPLATES {
            return Err(Error::TooMany);
        }
        found.push((pointer, value));
        return Ok(());
    };
    // A member that is of another type than the path takes it for holds no template.
    let is = |first| value.get().trim_start().starts_with(first);
    if is('{') {
        for (name, member) in members(value)? {
            if segment == "*" || *segment == name {
                let escaped = name.replace('~', "~0").replace('/', "~1");
                walk(member, rest, format!("{pointer}/{escaped}"), found)?;
            }
        }
    } else if is('[') && segment == "*" {
        for (index, member) in read::<Vec<&'a RawValue>>(value)?.into_iter().enumerate() {
            walk(member, rest, format!("{pointer}/{index}"), found)?;
        }
    }
    Ok(())
}

/// The annotation of an object or a pod template.
fn add_annotation(object: &Members<'_>, workload: &mut Workload) -> Result<(), Error> {
    let Some(metadata) = member(object, "metadata") else { return Ok(()) };
    let metadata = members(metadata)?;
    let Some(annotations) = member(&metadata, "annotations") else { return Ok(()) };
    let annotation = text(&members(annotations)?, BREAKGLASS)?;
    workload.breakglass.extend(annotation.filter(|text| !workload.breakglass.contains(text)));
    Ok(())
}

/// What the core API's `PodSpec` names images in.
fn add_spec(spec: &Members<'_>, pointer: &str, workload: &mut Workload) -> Result<(), Error> {
    add_pulled_with(spec, &mut workload.pulled_with)?;
    for (list, what) in
        [("containers", "container"), ("initContainers", "init container"), ("ephemeralContainers", "ephemeral container")]
    {
        for (index, container) in elements(spec, list)?.into_iter().enumerate() {
            add_image(&members(container)?, "image", (what, container), format!("{pointer}/{list}/{index}/image"), workload)?;
        }
    }
    // What is in an image volume is run as easily as what is in an image.
    for (index, volume) in elements(spec, "volumes")?.into_iter().enumerate() {
        if let Some(image) = member(&members(volume)?, "image") {
            let pointer = format!("{pointer}/volumes/{index}/image/reference");
            add_image(&members(image)?, "reference", ("volume", volume), pointer, workload)?;
        }
    }
    Ok(())
}

fn add_pulled_with(spec: &Members<'_>, pulled_with: &mut PulledWith) -> Result<(), Error> {
    let secrets = elements(spec, "imagePullSecrets")?;
    for secret in &secrets {
        text(&members(secret)?, "name")?.into_iter().for_each(|name| note(&mut pulled_with.secrets, name));
    }
    if secrets.is_empty() {
        let account = text(spec, "serviceAccountName")?.filter(|name| !name.is_empty());
        note(&mut pulled_with.accounts, account.unwrap_or_else(|| "default".to_owned()));
    }
    Ok(())
}

fn note(names: &mut Vec<String>, name: String) {
    if names.len() < MOST_SECRETS && !names.contains(&name) {
        names.push(name);
    }
}

/// One without an image is the API server's to refuse.
fn add_image(
    holder: &Members<'_>,
    name: &str,
    (what, named): (&str, &RawValue),
    pointer: String,
    workload: &mut Workload,
) -> Result<(), Error> {
    if let Some(text) = text(holder, name)?.filter(|text| !text.is_empty()) {
        let name = self::text(&members(named)?, "name")?.unwrap_or_default();
        workload.images.push(Image { pointer, what: format!("{what} {name}"), text });
    }
    Ok(())
}

/// An object by its members; of two with one name the last counts, as it does to the API server.
type Members<'a> = BTreeMap<Cow<'a, str>, &'a RawValue>;

fn members(object: &RawValue) -> Result<Members<'_>, Error> {
    read(object)
}

/// One that is `null` is not there.
fn member<'a>(object: &Members<'a>, name: &str) -> Option<&'a RawValue> {
    object.get(name).copied().filter(|value| value.get() != "null")
}

fn text(object: &Members<'_>, name: &str) -> Result<Option<String>, Error> {
    member(object, name).map(read).transpose()
}

fn elements<'a>(object: &Members<'a>, name: &str) -> Result<Vec<&'a RawValue>, Error> {
    member(object, name).map(read).transpose().map(Option::unwrap_or_default)
}

fn read<'a, T: Deserialize<'a>>(value: &'a RawValue) -> Result<T, Error> {
    serde_json::from_str(value.get()).map_err(Error::Malformed)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json, value::to_raw_value};

    use super::*;

    fn read(kinds: &Kinds, group: &str, kind: &str, object: &Value) -> Option<Workload> {
        let kind = GroupKind { group: group.to_owned(), kind: kind.to_owned() };
        kinds.read(&kind, &to_raw_value(object).unwrap()).unwrap()
    }

    fn pod_spec() -> Value {
        json!({
            "containers": [{"name": "web", "image": "web:1", "env": [{"name": "image", "value": "no"}]}, {"name": "none"}],
            "initContainers": [{"name": "init", "image": "init:1"}],
            "ephemeralContainers": null,
            "volumes": [{"name": "data", "emptyDir": {}}, {"name": "model", "image": {"reference": "model:1"}}],
        })
    }

    #[test]
    fn images_are_found_in_every_kind_where_a_patch_would_change_them() {
        let template = json!({"metadata": {"annotations": {"countersign.dev/breakglass": "x"}}, "spec": pod_spec()});
        let kinds = Kinds::default();
        for (group, kind, object, base) in [
            ("", "Pod", template.clone(), ""),
            ("", "ReplicationController", json!({"spec": {"template": template}}), "/spec/template"),
            ("apps", "Deployment", json!({"spec": {"template": template}}), "/spec/template"),
            ("apps", "ReplicaSet", json!({"spec": {"template": template}}), "/spec/template"),
            ("apps", "StatefulSet", json!({"spec": {"template": template}}), "/spec/template"),
            ("apps", "DaemonSet", json!({"spec": {"template": template}}), "/spec/template"),
            ("batch", "Job", json!({"spec": {"template": template}}), "/spec/template"),
            (
                "batch",
                "CronJob",
                json!({"spec": {"jobTemplate": {"spec": {"template": template}}}}),
                "/spec/jobTemplate/spec/template",
            ),
        ] {
            let workload = read(&kinds, group, kind, &object).unwrap();
            let found: Vec<_> = workload.images.iter().map(|image| (image.text.as_str(), image.pointer.clone())).collect();
            let expected = [
                ("web:1", format!("{base}/spec/containers/0/image")),
                ("init:1", format!("{base}/spec/initContainers/0/image")),
                ("model:1", format!("{base}/spec/volumes/1/image/reference")),
            ];
            assert_eq!(found, expected, "{kind}");
            assert_eq!((workload.is_template, workload.breakglass), (kind != "Pod", vec!["x".to_owned()]), "{kind}");
            for (text, pointer) in &expected {
                assert_eq!(object.pointer(pointer).unwrap(), text, "{kind}");
            }
        }
        assert_eq!(read(&kinds, "", "ConfigMap", &json!({"spec": pod_spec()})), None);
        assert_eq!(read(&kinds, "example.com", "Pod", &json!({"spec": pod_spec()})), None);
    }

    #[test]
    fn what_pods_are_pulled_with_is_their_secrets_or_else_their_service_account() {
        let pulled_with = |spec: Value| {
            let workload = read(&Kinds::default(), "apps", "Deployment", &json!({"spec": {"template": {"spec": spec}}})).unwrap();
            (workload.pulled_with.secrets, workload.pulled_with.accounts)
        };
        let named = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let both = json!({"imagePullSecrets": [{"name": "a"}, {"name": "b"}, {"name": "a"}, {}], "serviceAccountName": "web"});
        assert_eq!(pulled_with(both), (named(&["a", "b"]), vec![]));
        assert_eq!(pulled_with(json!({"serviceAccountName": "web"})), (vec![], named(&["web"])));
        assert_eq!(pulled_with(json!({"imagePullSecrets": [], "serviceAccountName": ""})), (vec![], named(&["default"])));
    }

    #[test]
    fn ephemeral_containers_are_found_in_the_form_of_old_clusters_too() {
        let object = json!({"ephemeralContainers": [{"name": "debug", "image": "debug:1"}]});
        let workload = read(&Kinds::default(), "", "EphemeralContainers", &object).unwrap();
        assert_eq!(workload.images[0].pointer, "/ephemeralContainers/0/image");
    }

    #[test]
    fn custom_kinds_are_read_where_the_configuration_says() {
        let kind = |kind: &str| GroupKind { group: "example.com".to_owned(), kind: kind.to_owned() };
        let path = |text: &str| text.split('.').map(str::to_owned).collect::<Vec<_>>();
        let kinds = Kinds::new([
            (kind("Rollout"), vec![path("spec.template")]),
            (kind("TrainJob"), vec![path("spec.replicas.*.template"), path("spec.extra")]),
            (GroupKind { group: String::new(), kind: "Pod".to_owned() }, vec![path("nowhere")]),
        ]);
        let template = json!({"spec": {"containers": [{"name": "c", "image": "app:1"}]}});
        let rollout = read(&kinds, "example.com", "Rollout", &json!({"spec": {"template": template}})).unwrap();
        assert_eq!(rollout.images[0].pointer, "/spec/template/spec/containers/0/image");
        let replicas = json!({"spec": {"replicas": {"a/b": {"template": template}, "c": {"template": template}}, "extra": 7}});
        let kind = GroupKind { group: "example.com".to_owned(), kind: "TrainJob".to_owned() };
        let mistyped = kinds.read(&kind, &to_raw_value(&replicas).unwrap());
        assert!(matches!(mistyped, Err(Error::Malformed(_))), "a template that is a number is no template");
        let replicas = json!({"spec": {"replicas": {"a/b": {"template": template}, "c": {"template": template}}}});
        let found = read(&kinds, "example.com", "TrainJob", &replicas).unwrap();
        assert_eq!(found.images[0].pointer, "/spec/replicas/a~1b/template/spec/containers/0/image");
        assert_eq!(replicas.pointer(&found.images[0].pointer).unwrap(), "app:1");
        let list = json!({"spec": {"replicas": [{"template": template}, {"template": template}, {}]}});
        assert_eq!(read(&kinds, "example.com", "TrainJob", &list).unwrap().images.len(), 2);
        assert_eq!(read(&kinds, "example.com", "Rollout", &json!({"spec": {"workloadRef": {}}})).unwrap().images, []);
        assert_eq!(read(&kinds, "", "Pod", &template).unwrap().images.len(), 1, "what is built in cannot be configured away");
    }

    #[test]
    fn of_an_update_only_what_it_changes_counts() {
        let of = |kind: &str, images: &[(&str, &str)]| {
            let containers: Vec<_> = images.iter().map(|(name, image)| json!({"name": name, "image": image})).collect();
            let spec = json!({"containers": containers});
            match kind {
                "Pod" => read(&Kinds::default(), "", "Pod", &json!({"spec": spec})).unwrap(),
                _ => read(&Kinds::default(), "apps", kind, &json!({"spec": {"template": {"spec": spec}}})).unwrap(),
            }
        };
        let texts = |images: Vec<Image>| images.into_iter().map(|image| image.text).collect::<Vec<_>>();
        let changed = |kind, new: &[_], old: &[_]| texts(of(kind, new).changed_since(&of(kind, old)));
        let before = [("a", "a:1"), ("b", "b:1")];
        for kind in ["Pod", "Deployment"] {
            assert!(changed(kind, &before, &before).is_empty());
            assert!(changed(kind, &[("b", "b:1"), ("a", "a:1")], &before).is_empty(), "another order is no change");
            assert!(changed(kind, &[("a", "a:1")], &before).is_empty(), "fewer containers bring nothing");
        }
        assert_eq!(changed("Pod", &[("a", "a:2"), ("b", "b:1")], &before), ["a:2"]);
        assert_eq!(changed("Deployment", &[("a", "a:2"), ("b", "b:1")], &before), ["a:2", "b:1"]);
        assert_eq!(changed("Pod", &[("a", "b:1"), ("b", "b:1")], &before), ["b:1"], "an image of another container is new");
    }

    #[test]
    fn objects_that_are_not_what_they_say_are_errors_and_never_panics() {
        let pod = GroupKind { group: String::new(), kind: "Pod".to_owned() };
        for object in [
            json!(null),
            json!([]),
            json!("x"),
            json!({"spec": 1}),
            json!({"spec": {"containers": {}}}),
            json!({"metadata": []}),
            json!({"spec": {"containers": [["web", "web:1"]]}}),
        ] {
            assert!(Kinds::default().read(&pod, &to_raw_value(&object).unwrap()).is_err(), "{object}");
        }
        for object in [json!({}), json!({"spec": null}), json!({"metadata": null, "spec": {"containers": null}})] {
            assert_eq!(Kinds::default().read(&pod, &to_raw_value(&object).unwrap()).unwrap().unwrap().images, []);
        }
    }
}
