//! What an API server, or whoever reaches the webhook's port, can send; and manifests of the command line.
#![no_main]

use std::sync::LazyLock;

use countersign::admission::{GroupKind, Kinds, Request, manifest};
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
            for image in workload.images.iter().take_while(|_| tree.is_some()) {
                let there = tree.as_ref().and_then(|tree| tree.pointer(&image.pointer));
                assert_eq!(there.and_then(serde_json::Value::as_str), Some(image.text.as_str()));
            }
        }
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(objects) = manifest::objects(text)
    {
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
