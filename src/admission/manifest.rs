//! Manifests as people keep them: YAML with several documents and lists, or JSON, which is YAML too. They are judged by the
//! same road as what a cluster is asked to run, and tags are pinned in the text itself, so that comments stay.

use std::{borrow::Cow, collections::HashMap, ops::Range};

use granit_parser::{Event, Options, Parser, ScalarStyle};
use serde_json::{
    Value,
    value::{RawValue, to_raw_value},
};

use super::review::GroupKind;

/// One object of a manifest.
#[derive(Debug)]
pub struct Object {
    pub kind: GroupKind,
    /// Of the kind's group: `v1`.
    pub version: String,
    /// None if the manifest leaves it to whoever applies it.
    pub namespace: Option<String>,
    pub name: String,
    pub content: Box<RawValue>,
    place: Place,
}

/// Where an object begins: the document, counted from 0, and a JSON pointer within it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Place {
    document: usize,
    pointer: String,
}

/// What is wrong with a manifest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("it is no YAML: {0}")]
    Yaml(String),
    #[error("document {document}{pointer} is no Kubernetes object: it has no `kind` and `apiVersion`")]
    NoObject { document: usize, pointer: String },
    #[error(
        "the image {0} does not stand where it is used, or not as one plain or quoted text (an alias of a whole section, or a \
         block): write it out, so that it can be pinned there"
    )]
    NotInPlace(String),
}

impl Object {
    /// Where it stands in its manifest: `document 2`, or `document 2/items/0` in a list. Empty documents do not count.
    #[must_use]
    pub fn place(&self) -> String {
        format!("document {}{}", self.place.document + 1, self.place.pointer)
    }

    /// Whether there are containers with images somewhere in it, as there are in whatever makes pods.
    #[must_use]
    pub fn seems_to_run(&self) -> bool {
        fn holds(value: &Value) -> bool {
            match value {
                Value::Array(elements) => elements.iter().any(holds),
                Value::Object(members) => members.iter().any(|(name, value)| {
                    let images = || value.as_array().into_iter().flatten().any(|element| element["image"].is_string());
                    (name == "containers" && images()) || holds(value)
                }),
                _ => false,
            }
        }
        serde_json::from_str(self.content.get()).is_ok_and(|value: Value| holds(&value))
    }
}

/// The objects of a manifest, those in lists included.
pub fn objects(text: &str) -> Result<Vec<Object>, Error> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| Error::Yaml(error.to_string()))?;
    let mut found = vec![];
    for (document, value) in documents.into_iter().filter(|value| !value.is_null()).enumerate() {
        add(value, Place { document, pointer: String::new() }, &mut found)?;
    }
    Ok(found)
}

fn add(mut value: Value, place: Place, found: &mut Vec<Object>) -> Result<(), Error> {
    let text = |value: &Value, name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
    let no_object = |place: &Place| Error::NoObject { document: place.document + 1, pointer: place.pointer.clone() };
    let (Some(version), Some(kind)) = (text(&value, "apiVersion"), text(&value, "kind")) else { return Err(no_object(&place)) };
    if kind.ends_with("List")
        && let Some(Value::Array(items)) = value.get_mut("items").map(Value::take)
    {
        for (index, item) in items.into_iter().enumerate() {
            let pointer = format!("{}/items/{index}", place.pointer);
            add(item, Place { document: place.document, pointer }, found)?;
        }
        return Ok(());
    }
    let metadata = value.get("metadata").cloned().unwrap_or_default();
    let (group, version) = version.split_once('/').unwrap_or(("", &version));
    found.push(Object {
        kind: GroupKind { group: group.to_owned(), kind },
        version: version.to_owned(),
        namespace: text(&metadata, "namespace"),
        name: text(&metadata, "name").or_else(|| text(&metadata, "generateName")).unwrap_or_default(),
        content: to_raw_value(&value).map_err(|error| Error::Yaml(error.to_string()))?,
        place,
    });
    Ok(())
}

/// One image that is to be written otherwise.
#[derive(Debug, Clone)]
pub struct Change<'a> {
    pub object: &'a Object,
    /// Within the object.
    pub pointer: &'a str,
    pub before: &'a str,
    pub after: String,
}

/// The manifest with these images replaced, and all else as it was to the byte.
pub fn replace(text: &str, changes: &[Change<'_>]) -> Result<String, Error> {
    let spans = spans(text)?;
    let mut edits: Vec<(Range<usize>, String)> = vec![];
    for change in changes {
        let place = &change.object.place;
        let at = Place { document: place.document, pointer: format!("{}{}", place.pointer, change.pointer) };
        let not_in_place = || Error::NotInPlace(super::shown(change.before));
        let (span, style) = spans.get(&at).cloned().ok_or_else(not_in_place)?;
        let written = text.get(span.clone()).ok_or_else(not_in_place)?;
        // References need no quotes and no escapes, so what was written is the reference, in quotes or not.
        let quoted = match style {
            ScalarStyle::Plain => change.before.to_owned(),
            ScalarStyle::SingleQuoted => format!("'{}'", change.before),
            ScalarStyle::DoubleQuoted => format!("\"{}\"", change.before),
            _ => return Err(not_in_place()),
        };
        if written != quoted {
            return Err(not_in_place());
        }
        edits.push((span, quoted.replace(change.before, &change.after)));
    }
    // An anchor that several places use is one text.
    edits.sort_by_key(|(span, _)| span.start);
    edits.dedup();
    let mut result = String::with_capacity(text.len() + edits.len() * 80);
    let mut end = 0;
    for (span, after) in edits {
        if span.start < end {
            return Err(Error::NotInPlace(after));
        }
        result.push_str(&text[end..span.start]);
        result.push_str(&after);
        end = span.end;
    }
    result.push_str(&text[end..]);
    Ok(result)
}

type Spans = HashMap<Place, (Range<usize>, ScalarStyle)>;

/// Where each text of the manifest stands. A text behind an alias stands where its anchor does.
fn spans(text: &str) -> Result<Spans, Error> {
    let mut spans = Spans::new();
    let mut anchors: HashMap<usize, (Range<usize>, ScalarStyle)> = HashMap::new();
    let mut document: Option<usize> = None;
    let mut levels: Vec<Level> = vec![];
    let mut options = Options::default();
    options.emit_comments = false;
    for event in Parser::new_from_str_with_options(text, options) {
        let (event, span) = event.map_err(|error| Error::Yaml(error.to_string()))?;
        let mut leaf = |levels: &mut Vec<Level>, found: Option<(Range<usize>, ScalarStyle)>, key: Option<Cow<'_, str>>| {
            if let Some(Level::Map { key: open @ None }) = levels.last_mut() {
                *open = Some(key.unwrap_or_default().into_owned());
                return;
            }
            if let (Some(found), Some(document)) = (found, document) {
                spans.insert(Place { document, pointer: pointer(levels) }, found);
            }
            next(levels);
        };
        match event {
            Event::Scalar(value, style, anchor, _) => {
                let found = span.byte_range().map(|range| (range, style));
                if let Some(found) = found.clone().filter(|_| anchor != 0) {
                    anchors.insert(anchor, found);
                }
                leaf(&mut levels, found, Some(value));
            }
            Event::Alias(anchor) => leaf(&mut levels, anchors.get(&anchor).cloned(), None),
            Event::MappingStart(..) | Event::SequenceStart(..) => {
                if levels.is_empty() {
                    document = Some(document.map_or(0, |document| document + 1));
                }
                // A collection as a key names nothing that could be asked for.
                if let Some(Level::Map { key: open @ None }) = levels.last_mut() {
                    *open = Some("\u{0}".to_owned());
                    levels.push(Level::Key);
                }
                levels.push(if matches!(event, Event::MappingStart(..)) {
                    Level::Map { key: None }
                } else {
                    Level::List { index: 0 }
                });
            }
            Event::MappingEnd | Event::SequenceEnd => {
                levels.pop();
                if matches!(levels.last(), Some(Level::Key)) {
                    levels.pop();
                } else {
                    next(&mut levels);
                }
            }
            _ => {}
        }
    }
    Ok(spans)
}

enum Level {
    /// None: the key comes next.
    Map {
        key: Option<String>,
    },
    List {
        index: usize,
    },
    /// Within a key that is itself a collection.
    Key,
}

/// A value ended: what comes next in the collection that it was in?
fn next(levels: &mut [Level]) {
    match levels.last_mut() {
        Some(Level::Map { key }) => *key = None,
        Some(Level::List { index }) => *index += 1,
        Some(Level::Key) | None => {}
    }
}

fn pointer(levels: &[Level]) -> String {
    let segment = |level: &Level| match level {
        Level::Map { key } => format!("/{}", key.as_deref().unwrap_or_default().replace('~', "~0").replace('/', "~1")),
        Level::List { index } => format!("/{index}"),
        Level::Key => "/\u{0}".to_owned(),
    };
    levels.iter().map(segment).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "\
# Ours
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: payments}   # here
spec:
  template:
    spec:
      containers:
      - name: web
        image: web:1   # the web
      - {name: side, image: \"side:1\"}
      - name: third
        image: &third 'third:1'
---
# nothing
---
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: one}
  spec:
    containers: [{name: a, image: *missing}]
";

    fn manifest() -> String {
        MANIFEST.replace("*missing", "\"a:1\"")
    }

    #[test]
    fn objects_of_all_documents_and_lists_are_found() {
        let text = manifest();
        let objects = objects(&text).unwrap();
        let found: Vec<_> = objects.iter().map(|o| (o.kind.kind.as_str(), o.name.as_str(), o.namespace.as_deref())).collect();
        assert_eq!(found, [("Deployment", "web", Some("payments")), ("Pod", "one", None)]);
        assert_eq!((objects[0].kind.group.as_str(), objects[1].kind.group.as_str()), ("apps", ""));
    }

    #[test]
    fn images_are_replaced_where_they_stand_and_all_else_stays() {
        let text = manifest();
        let objects = objects(&text).unwrap();
        let change = |object: usize, pointer, before| Change {
            object: &objects[object],
            pointer,
            before,
            after: format!("{before}@sha256:d"),
        };
        let changed = replace(
            &text,
            &[
                change(1, "/spec/containers/0/image", "a:1"),
                change(0, "/spec/template/spec/containers/0/image", "web:1"),
                change(0, "/spec/template/spec/containers/1/image", "side:1"),
                change(0, "/spec/template/spec/containers/2/image", "third:1"),
            ],
        )
        .unwrap();
        let expected = ["web:1", "side:1", "third:1", "a:1"]
            .iter()
            .fold(text.clone(), |text, image| text.replace(image, &format!("{image}@sha256:d")));
        assert_eq!(changed, expected);
        assert_eq!(replace(&text, &[]).unwrap(), text);
    }

    #[test]
    fn an_alias_is_pinned_at_its_anchor_and_once() {
        let text =
            "x: &i app:1\napiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - {name: a, image: *i}\n  - {name: b, image: *i}\n";
        let objects = objects(text).unwrap();
        let change = |pointer| Change { object: &objects[0], pointer, before: "app:1", after: "app:1@d".to_owned() };
        let changed = replace(text, &[change("/spec/containers/0/image"), change("/spec/containers/1/image")]).unwrap();
        assert_eq!(changed, text.replace("app:1", "app:1@d"));
    }

    #[test]
    fn what_cannot_be_replaced_in_place_is_an_error() {
        for text in [
            "apiVersion: v1\nkind: Pod\nc: &c {image: app:1}\nspec:\n  containers: [*c]\n",
            "apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - image: >-\n      app:1\n",
            "apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - image: \"app\\x3a1\"\n",
        ] {
            let objects = objects(text).unwrap();
            let change =
                Change { object: &objects[0], pointer: "/spec/containers/0/image", before: "app:1", after: "app:1@d".to_owned() };
            assert!(matches!(replace(text, &[change]), Err(Error::NotInPlace(_))), "{text}");
        }
    }

    #[test]
    fn what_is_no_manifest_is_an_error_and_bombs_are_defused() {
        assert!(matches!(objects("a: [").unwrap_err(), Error::Yaml(_)));
        assert!(matches!(objects("just: text").unwrap_err(), Error::NoObject { document: 1, .. }));
        assert!(objects("").unwrap().is_empty());
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let before = format!("*a{}, ", level - 1).repeat(10);
            bomb.push_str(&format!("a{level}: &a{level} [{}]\n", before.trim_end_matches(", ")));
        }
        assert!(matches!(objects(&bomb).unwrap_err(), Error::Yaml(_)));
        assert!(objects(&"[".repeat(100_000)).is_err());
    }
}
