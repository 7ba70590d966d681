use serde_json::json;

use super::*;

const PEM: &str = include_str!("../../../tests/data/vectors/keys/p256.pub.pem");

fn objects(given: &[(&str, Value)]) -> Arc<Objects> {
    let object = |(name, spec): &(&str, Value)| {
        let object = json!({"metadata": {"name": name, "generation": 3}, "spec": spec});
        ((*name).to_owned(), Arc::new(serde_json::from_value(object).unwrap()))
    };
    Arc::new(given.iter().map(object).collect())
}

fn read(policies: &[(&str, Value)], witnesses: &[(&str, Value)], beside: &Beside<'_>) -> Resources {
    Resources::read(&Kept { policies: Some(objects(policies)), witnesses: Some(objects(witnesses)) }, beside)
}

fn state<'a>(resources: &'a Resources, name: &str) -> &'a State {
    resources.states.iter().flatten().find(|state| state.name() == name).unwrap()
}

fn closed<'a>(resources: &'a Resources) -> Vec<(&'a str, Vec<&'a str>)> {
    let namespaces = |closed: &'a Closed| closed.namespaces.iter().map(String::as_str).collect();
    resources.closed.iter().map(|closed| (closed.name.as_str(), namespaces(closed))).collect()
}

fn witness() -> Value {
    json!({"publicKey": PEM})
}

fn policy(witness: &str, namespace: &str) -> Value {
    json!({"witness": witness, "namespace": namespace, "enabled": true})
}

#[test]
fn as_long_as_not_both_kinds_were_read_nothing_is_admitted_anywhere() {
    for kept in [
        Kept::default(),
        Kept { policies: Some(objects(&[])), witnesses: None },
        Kept { policies: None, witnesses: Some(objects(&[])) },
    ] {
        let resources = Resources::read(&kept, &Beside::default());
        assert!(resources.states.is_none());
        assert_eq!(closed(&resources), [("(resources)", vec!["*"])]);
        let policies = Policies::with_closed(resources.policies, resources.closed, None).unwrap();
        assert_eq!(policies.of("anywhere").len(), 1);
    }
    assert_eq!(closed(&read(&[], &[], &Beside::default())), []);
}

#[test]
fn policies_use_the_witnesses_of_the_cluster_and_of_the_configuration() {
    let beside = Beside { witnesses: [("of-file", None)].into(), ..Beside::default() };
    let both = json!({"witnesses": ["release", "of-file"], "namespaces": ["pay*"], "enabled": true});
    let resources =
        read(&[("both", both), ("off", json!({"witness": "release", "namespace": "x"}))], &[("release", witness())], &beside);
    assert_eq!(resources.policies.iter().map(|policy| policy.name.as_str()).collect::<Vec<_>>(), ["both"]);
    assert_eq!(resources.witnesses.keys().collect::<Vec<_>>(), ["release"]);
    assert_eq!((state(&resources, "both").reason, state(&resources, "off").reason), ("InForce", "NotEnabled"));
    assert_eq!(closed(&resources), []);
}

#[test]
fn what_cannot_be_used_harms_no_other_and_closes_what_it_was_to_guard() {
    let broken = |change: &dyn Fn(&mut Value)| {
        let mut spec = policy("release", "shop");
        change(&mut spec);
        let resources =
            read(&[("broken", spec), ("good", policy("release", "payments"))], &[("release", witness())], &Beside::default());
        assert_eq!(resources.policies.len(), 1, "the other one is in force");
        let state = state(&resources, "broken");
        assert!(!state.is_ready);
        (
            state.message.clone(),
            closed(&resources).into_iter().flat_map(|(_, namespaces)| namespaces).map(str::to_owned).collect::<Vec<_>>(),
        )
    };
    let (message, namespaces) = broken(&|spec| spec["maxAge"] = json!("soon"));
    assert!(message.contains("no length of time") && message.ends_with("nothing is admitted to shop"), "{message}");
    assert_eq!(namespaces, ["shop"]);
    assert_eq!(broken(&|spec| spec["witness"] = json!("nobody")).1, ["shop"]);
    assert_eq!(broken(&|spec| spec["mode"] = json!("hard")).1, ["shop"]);
    // It is for a cluster, and nobody knows which this is.
    assert_eq!(broken(&|spec| spec["cluster"] = json!("prod")).1, ["shop"]);
    assert_eq!(broken(&|spec| spec["namespaces"] = json!(["team-[", "team-*"])).1, ["team-*", "shop"]);
    for mild in ["warn", "audit"] {
        let (message, namespaces) = broken(&|spec| {
            spec["mode"] = json!(mild);
            spec["witness"] = json!("nobody");
        });
        assert!(namespaces.is_empty() && !message.contains("admitted"), "{message}");
    }
    assert!(
        broken(&|spec| {
            spec["enabled"] = json!(false);
            spec["witness"] = json!("nobody");
        })
        .1
        .is_empty()
    );
}

#[test]
fn a_broken_policy_of_another_cluster_closes_nothing_here() {
    let beside = Beside { cluster: Some("prod-eu"), ..Beside::default() };
    let of = |cluster: &str| json!({"witness": "nobody", "namespace": "shop", "cluster": cluster, "enabled": true});
    assert_eq!(closed(&read(&[("us", of("prod-us"))], &[], &beside)), []);
    assert_eq!(closed(&read(&[("eu", of("prod-*"))], &[], &beside)), [("eu", vec!["shop"])]);
}

#[test]
fn a_witness_that_cannot_be_used_is_named_by_the_policies_that_want_it() {
    let broken = [("release", json!({"publicKey": "no"}))];
    let resources = read(&[("p", policy("release", "shop"))], &broken, &Beside::default());
    assert!(state(&resources, "release").message.contains("no public key"));
    assert!(state(&resources, "p").message.starts_with("witness release cannot be used: "), "{:?}", resources.states);
    // Nor does a resource take the place of what stands in the configuration.
    let why = Some("its key is in a KMS".to_owned());
    let beside = Beside { policies: ["mine"].into(), witnesses: [("release", why)].into(), ..Beside::default() };
    let resources = read(&[("mine", policy("release", "a")), ("p", policy("release", "b"))], &[("release", witness())], &beside);
    assert!(!state(&resources, "release").is_ready && resources.witnesses.is_empty());
    assert!(state(&resources, "mine").message.starts_with("a [[policy]] of the configuration has this name"));
    assert!(state(&resources, "p").message.starts_with("its key is in a KMS"));
    assert_eq!(closed(&resources), [("mine", vec!["a"]), ("p", vec!["b"])]);
}

#[test]
fn a_status_is_written_once_and_keeps_its_time_until_it_turns() {
    let now = |text: &str| text.parse().unwrap();
    let resources = read(&[("p", policy("nobody", "shop"))], &[], &Beside::default());
    let mut state = state(&resources, "p").clone();
    let patch = state.patch(now("2026-11-22T12:00:00.7Z")).unwrap();
    let condition = &patch["status"]["conditions"][0];
    assert_eq!((&condition["status"], &condition["reason"]), (&json!("False"), &json!("Refused")));
    assert_eq!((&condition["observedGeneration"], &patch["status"]["observedGeneration"]), (&json!(3), &json!(3)));
    let mut object = (*state.object).clone();
    object.data["status"] = patch["status"].clone();
    state.object = Arc::new(object);
    assert_eq!(state.patch(now("2026-11-22T13:00:00Z")), None);
    state.message = "another problem".into();
    let again = state.patch(now("2026-11-22T13:00:00Z")).unwrap();
    assert_eq!(again["status"]["conditions"][0]["lastTransitionTime"], condition["lastTransitionTime"]);
    state.is_ready = true;
    let turned = state.patch(now("2026-11-22T14:00:00Z")).unwrap();
    assert_eq!(turned["status"]["conditions"][0]["lastTransitionTime"], "2026-11-22T14:00:00Z");
}

#[test]
fn the_definitions_are_as_kubernetes_has_them_and_hold_what_is_read() {
    let [policies, witnesses] = definitions();
    assert_eq!(policies.metadata.name.as_deref(), Some("securitypolicies.countersign.dev"));
    assert_eq!((policies.spec.scope.as_str(), witnesses.spec.scope.as_str()), ("Cluster", "Cluster"));
    for definition in [policies, witnesses] {
        let version = &definition.spec.versions[0];
        assert_eq!((version.name.as_str(), version.served, version.storage), ("v1", true, true));
        assert!(version.subresources.as_ref().unwrap().status.is_some());
        let schema = version.schema.as_ref().unwrap().open_api_v3_schema.as_ref().unwrap();
        assert_eq!(schema.required.as_deref(), Some(&["spec".to_owned()][..]));
    }
}

#[test]
fn the_manifest_of_deploy_is_what_the_program_prints() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/kubernetes/resources.yaml");
    let printed = manifest();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, &printed).unwrap();
    }
    assert!(
        std::fs::read_to_string(path).unwrap() == printed,
        "BLESS=1 cargo test -p countersign --lib resources writes it anew"
    );
    let read: Vec<Value> = serde_saphyr::from_multiple(&printed).unwrap();
    assert_eq!(read, definitions().map(|definition| serde_json::to_value(definition).unwrap()));
}
