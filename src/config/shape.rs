//! What may be written: every section and key, declared once. The reader, the JSON Schema and `config/default.toml`
//! all come from these declarations.

/// A table of the file: a section, or a nested table.
pub(crate) struct Table {
    /// As it is called in messages: `[server]`, `[[rule]]`, `tls`.
    pub title: &'static str,
    pub doc: &'static str,
    pub keys: &'static [Key],
}

impl Table {
    pub(crate) fn key(&self, name: &str) -> Option<&'static Key> {
        self.keys.iter().find(|key| key.name == name)
    }

    /// The keys that this version reads.
    pub(crate) fn current_keys(&self) -> impl Iterator<Item = &'static Key> {
        self.keys.iter().filter(|key| !matches!(key.presence, Presence::Later))
    }
}

/// One key of a table.
pub(crate) struct Key {
    pub name: &'static str,
    pub kind: Kind,
    pub presence: Presence,
    /// A value as it is written, to show; the default where there is one.
    pub example: &'static str,
    /// Sentences for an administrator.
    pub doc: &'static str,
}

/// What it means when a key is not there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    Required,
    Optional,
    /// The key's example is its default.
    Defaulted,
    /// The key belongs to a later version: it is known, and refused.
    Later,
}

impl Key {
    pub(crate) const fn required(name: &'static str, kind: Kind, example: &'static str, doc: &'static str) -> Self {
        Self { name, kind, presence: Presence::Required, example, doc }
    }

    pub(crate) const fn optional(name: &'static str, kind: Kind, example: &'static str, doc: &'static str) -> Self {
        Self { name, kind, presence: Presence::Optional, example, doc }
    }

    /// `default` is TOML text, read by the same code as what an administrator writes.
    pub(crate) const fn defaulted(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Self {
        Self { name, kind, presence: Presence::Defaulted, example: default, doc }
    }

    /// As it is called in messages: `name`, or a section's header.
    pub(crate) fn shown(&self) -> String {
        match self.kind {
            Kind::Table(table) | Kind::Tables(table) if table.title.starts_with('[') => table.title.to_owned(),
            _ => format!("`{}`", self.name),
        }
    }

    pub(crate) const fn later(name: &'static str) -> Self {
        Self { name, kind: Kind::Text(&ANY_TEXT), presence: Presence::Later, example: "", doc: "" }
    }
}

/// What a value is.
pub(crate) enum Kind {
    Text(&'static Grammar),
    Flag,
    /// A whole number within bounds, both included.
    Count {
        least: u64,
        most: u64,
    },
    /// `"500ms"`, `"24h"`; bounds in milliseconds, both included.
    Duration {
        least: u64,
        most: u64,
    },
    /// `"5MiB"`; bounds in bytes, both included.
    Size {
        least: u64,
        most: u64,
    },
    /// A TOML offset date-time.
    Time,
    Path,
    Secret,
    /// A text, or a secret if there is a password in it.
    Url(&'static Grammar),
    Choice(&'static Choice),
    List(&'static Kind),
    Table(&'static Table),
    Tables(&'static Table),
}

/// What a text must look like. The section's own parser decides; this is what messages and the schema say.
pub(crate) struct Grammar {
    /// Completes "it is …".
    pub noun: &'static str,
    /// For editors; may be wider than the parser, never narrower.
    pub pattern: Option<&'static str>,
}

pub(crate) static ANY_TEXT: Grammar = Grammar { noun: "a text in quotes", pattern: None };

/// A closed set of words.
pub(crate) struct Choice {
    pub words: &'static [Word],
    /// Words that a later version understands.
    pub later: &'static [&'static str],
}

pub(crate) struct Word {
    pub text: &'static str,
    pub doc: &'static str,
}

impl Choice {
    /// `"a", "b"`
    pub(crate) fn listed(&self) -> String {
        self.words.iter().map(|word| format!("\"{}\"", word.text)).collect::<Vec<_>>().join(", ")
    }
}

impl Kind {
    /// Completes "it is …".
    pub(crate) fn noun(&self) -> String {
        match self {
            Self::Text(grammar) | Self::Url(grammar) => grammar.noun.to_owned(),
            Self::Flag => "true or false".to_owned(),
            Self::Count { least, most } => format!("a whole number from {least} to {most}"),
            Self::Duration { .. } => "a length of time in quotes".to_owned(),
            Self::Size { .. } => "a size in quotes".to_owned(),
            Self::Time => "a date and time with its offset, without quotes".to_owned(),
            Self::Path => "a path in quotes".to_owned(),
            Self::Secret => "{ file = \"…\" } or { env = \"…\" }".to_owned(),
            Self::Choice(choice) if choice.words.len() == 1 => choice.listed(),
            Self::Choice(choice) => format!("one of {}", choice.listed()),
            Self::List(_) => "a list in square brackets".to_owned(),
            Self::Table(_) => "a table".to_owned(),
            Self::Tables(_) => "a list of tables".to_owned(),
        }
    }
}

/// The word that was probably meant: the nearest one, if it is near enough to be a slip of the finger.
pub(crate) fn nearest<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Long texts are no slip of the finger, and the distance costs the product of both lengths.
    const LONGEST: usize = 100;
    if text.len() > LONGEST {
        return None;
    }
    let text = text.to_lowercase();
    known
        .into_iter()
        .filter(|word| word.len() <= LONGEST)
        .map(|word| (strsim::osa_distance(&text, &word.to_lowercase()), word))
        .filter(|(distance, word)| *distance <= (word.chars().count() / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, word)| word)
}
