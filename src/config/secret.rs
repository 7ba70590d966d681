use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    path::PathBuf,
};

use secrecy::{ExposeSecret as _, SecretString};
use toml::de::DeValue;

use crate::kms::SecretSource;

use super::{
    outside::Unreadable,
    report::{Wrong, cut},
    shape::{ANY_TEXT, Key, Kind, Table},
    value::Value,
};

/// A password, token or private key from the configuration. It is wiped when dropped, and `Debug` prints `<redacted>`.
///
/// Two are equal if they stand in the same place, whatever is there now; or, if they are written out, if they are the same.
#[derive(Clone)]
pub struct Secret {
    text: SecretString,
    place: Place,
}

/// Where a secret is.
#[derive(Clone, PartialEq, Eq)]
enum Place {
    Configuration,
    File(PathBuf),
    Variable(String),
}

/// Far above any password, token or private key.
const LARGEST: u64 = 64 << 10;

impl Secret {
    #[must_use]
    pub fn new(text: String) -> Self {
        Self { text: text.into(), place: Place::Configuration }
    }

    /// The secret itself, for the one place that sends or compares it.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.text.expose_secret()
    }

    /// As it is by now: a secret in a file may have been rotated.
    ///
    /// # Errors
    /// What is wrong, without anything of the secret.
    pub fn again(&self) -> Result<SecretString, String> {
        let Place::File(path) = &self.place else { return Ok(self.text.clone()) };
        let read = || {
            let mut text = String::new();
            File::open(path)?.take(LARGEST).read_to_string(&mut text)?;
            Ok(text)
        };
        let text = read().map_err(|error: io::Error| format!("{}: {error}", path.display()))?;
        match text.trim_end_matches(['\r', '\n']) {
            "" => Err(format!("{} is empty", path.display())),
            secret => Ok(secret.to_owned().into()),
        }
    }

    /// Where it is, for who reads it anew each time.
    pub(crate) fn source(self) -> SecretSource {
        match self.place {
            Place::Configuration => SecretSource::Given(self.text),
            Place::File(path) => SecretSource::File(path),
            Place::Variable(name) => SecretSource::Variable(name),
        }
    }

    fn in_place(self, place: Place) -> Self {
        Self { place, ..self }
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.place == other.place && (self.place != Place::Configuration || self.expose() == other.expose())
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<redacted>")
    }
}

/// Where a secret is, if it is not written out.
pub(crate) static REFERENCE: Table = Table {
    title: "a secret",
    doc: "Where a secret is.",
    keys: &[
        Key::optional(
            "file",
            Kind::Path,
            "\"/run/secrets/password\"",
            "The file that holds the secret and nothing else; a line break at its end is not part of it.",
        ),
        Key::optional("env", Kind::Text(&ANY_TEXT), "\"PASSWORD\"", "The environment variable that holds the secret."),
    ],
};

/// Reads a secret from where the configuration says that it is. Nothing of what was written or read is ever reported.
pub(crate) fn read(value: &Value<'_>) -> Option<Secret> {
    let name = value.key.name;
    match value.toml.get_ref() {
        DeValue::String(text) => {
            value.report.hide(value.span.clone());
            if text.is_empty() {
                return empty(value, &format!("`{name}`"));
            }
            let message = format!("`{name}` stands in the configuration file itself");
            let help = format!("keep it in a file of its own: {name} = {{ file = \"/run/secrets/{name}\" }}");
            value.report.warning(value.span.clone(), message, help);
            Some(Secret::new(text.as_ref().to_owned()))
        }
        DeValue::Table(_) => {
            let section = value.section(&REFERENCE)?;
            match (section.value("file"), section.value("env")) {
                (Some(file), None) => from_file(&file),
                (None, Some(env)) => from_env(&env),
                (Some(_), Some(second)) => second
                    .wrong(Wrong::new(format!("`{name}` is in a file or in a variable, not in both"), "remove one of the two")),
                (None, None) if section.is_empty() => value.wrong(Wrong::new(
                    format!("`{name}` does not say where the secret is"),
                    format!("write {name} = {{ file = \"…\" }} or {name} = {{ env = \"…\" }}"),
                )),
                (None, None) => None,
            }
        }
        _ => value.mismatch(),
    }
}

fn from_file(value: &Value<'_>) -> Option<Secret> {
    let path = value.path()?;
    let shown = cut(&path.display().to_string());
    let contents = match value.report.outside.read(&path, LARGEST) {
        Ok(contents) => contents,
        Err(error) => {
            let help = match error {
                Unreadable::Missing => "relative paths are relative to the folder of this configuration file",
                Unreadable::NotAFile => "name a regular file, or a link to one",
                Unreadable::TooLarge(_) => "the file holds the secret and nothing else",
                Unreadable::Io(_) => "the user that countersign runs as must be able to read it",
            };
            return value.wrong(Wrong::new(format!("{shown}: {error}"), help));
        }
    };
    if contents.world_readable {
        let help = format!("chmod o-r {shown}");
        value.report.warning(
            value.span.clone(),
            format!("{shown} holds a secret, and every user of this machine may read it"),
            help,
        );
    }
    let Ok(text) = String::from_utf8(contents.bytes) else {
        return value.wrong(Wrong::new(format!("{shown} is no text"), "the file holds the secret as UTF-8 text"));
    };
    whole(value, text.trim_end_matches(['\r', '\n']).to_owned(), &shown).map(|secret| secret.in_place(Place::File(path)))
}

fn from_env(value: &Value<'_>) -> Option<Secret> {
    let variable = value.text()?;
    let shown = cut(&variable);
    if shown.is_empty() {
        return value.wrong(Wrong::new("`env` names no environment variable", "write its name: { env = \"PASSWORD\" }"));
    }
    match value.report.outside.env(&variable) {
        Some(text) => whole(value, text, &format!("the environment variable {shown}"))
            .map(|secret| secret.in_place(Place::Variable(variable))),
        None => value.wrong(Wrong::new(
            format!("the environment variable {shown} is not set, or is no text"),
            "set it where countersign is started, or keep the secret in a file: { file = \"…\" }",
        )),
    }
}

/// An empty secret protects nothing: most often a variable or file that was prepared and never filled.
fn whole(value: &Value<'_>, text: String, what: &str) -> Option<Secret> {
    if text.is_empty() { empty(value, what) } else { Some(Secret::new(text)) }
}

fn empty(value: &Value<'_>, what: &str) -> Option<Secret> {
    value.wrong(Wrong::new(format!("{what} is empty"), "an empty secret protects nothing: fill it in"))
}
