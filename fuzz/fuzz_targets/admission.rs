//! What an API server, or whoever reaches the webhook's port, can send; manifests of the command line, and lists of pods.
#![no_main]

use std::{path::Path, sync::LazyLock};

use countersign::{
    admission::{Beside, GivenResources, GroupKind, Kinds, Request, Resources, Response, Running, manifest, shown},
    oci::Reference,
};
use libfuzzer_sys::fuzz_target;

static KINDS: LazyLock<Kinds> = LazyLock::new(|| {
    let kind = GroupKind { group: "argoproj.io".to_owned(), kind: "Rollout".to_owned() };
    let path = |text: &str| text.split('.').map(str::to_owned).collect::<Vec<_>>();
    Kinds::new([(kind, vec![path("spec.template"), path("spec.*.*.template")])])
});

fuzz_target!(|data: &[u8]| {
    if let Ok(request) = Request::parse(data) {
        let read = |object| KINDS.read(&request.kind, object).ok().flatten();
        if let Some(workload) = request.object.and_then(read) {
            let before = request.old_object.and_then(read).unwrap_or_default();
            let changed = workload.changed_since(&before);
            assert!(changed.len() <= workload.images.len());
            assert!(workload.changed_since(&workload).is_empty(), "nothing changes from itself to itself");
            // What would be patched is what was read; numbers that only a tree minds are in nobody's way.
            let tree = request.object.and_then(|object| serde_json::from_str::<serde_json::Value>(object.get()).ok());
            for image in &workload.images {
                if let Ok(reference) = image.text.parse::<Reference>() {
                    assert_eq!(reference.to_string().parse().as_ref(), Ok(&reference), "a reference is read as it is written");
                }
                assert!(!shown(&image.text).contains(char::is_control));
            }
            // Whatever it is about, the answer is JSON.
            let patch = workload.images.iter().map(|image| image.replaced_by(image.text.clone())).collect();
            let answer = Response { patch, ..Response::default() }.to_json(&request.uid);
            assert!(serde_json::from_slice::<serde_json::Value>(&answer).is_ok());
            for image in workload.images.iter().take_while(|_| tree.is_some()) {
                let there = tree.as_ref().and_then(|tree| tree.pointer(&image.pointer));
                assert_eq!(there.and_then(serde_json::Value::as_str), Some(image.text.as_str()));
            }
        }
    }
    let text = std::str::from_utf8(data).unwrap_or_default();
    let _ = Running::default().add(text);
    if let Ok(objects) = manifest::objects(text) {
        let mut given = GivenResources::default();
        for object in &objects {
            let _ = given.take(Path::new("fuzz.yaml"), object);
        }
        let resources = Resources::read(&given.kept(), &Beside::default());
        assert!(resources.states.is_some_and(|states| states.len() >= resources.policies.len()), "each is told what became of it");
        for object in &objects {
            let Ok(Some(workload)) = KINDS.read(&object.kind, &object.content) else { continue };
            let changes: Vec<_> = workload
                .images
                .iter()
                .map(|image| manifest::Change { object, pointer: &image.pointer, before: &image.text, after: image.text.clone() })
                .collect();
            if let Ok(same) = manifest::replace(text, &changes) {
                assert_eq!(same, text, "an image replaced by itself changes nothing");
            }
        }
    }
});
