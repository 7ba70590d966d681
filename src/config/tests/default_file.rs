//! `config/default.toml` is written from the declarations: every key, what it means, its default.

use std::{fmt::Write as _, fs, path::Path};

use super::super::{
    DEFAULT_TOML, ROOT,
    shape::{Key, Kind, Presence, Table},
};

const PREAMBLE: &str = "\
# Everything that can be configured: what each key means, and its default.
#
# A key that begins with # has no default, and is shown with an example.
# Relative paths are relative to the folder of the file they stand in.
# A secret is { file = \"…\" } or { env = \"…\" }. It may also stand in the file itself, with a warning.
# Lengths of time are \"500ms\", \"20s\", \"10m\", \"24h\" or \"7d\"; sizes are \"512B\", \"64KiB\", \"5MiB\" or \"1GiB\".
#
# `countersign check --config FILE` says what is wrong with a configuration; `countersign check --schema`
# prints a JSON Schema for editors. Whole files to start from are in the folder examples.
";

#[test]
fn default_toml_has_every_key_with_its_default_and_what_it_means() {
    let expected = default_toml();
    if std::env::var_os("BLESS").is_some() {
        fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/default.toml"), &expected).unwrap();
    } else {
        assert!(DEFAULT_TOML == expected, "config/default.toml is out of date: run this test with BLESS=1");
    }
}

fn default_toml() -> String {
    let mut text = PREAMBLE.to_owned();
    for key in ROOT.current_keys() {
        match key.kind {
            Kind::Table(table) => {
                write_comment(&mut text, "\n\n# ", table.doc);
                writeln!(text, "[{}]", key.name).unwrap();
                write_keys(&mut text, table, "");
            }
            Kind::Tables(table) => {
                write_comment(&mut text, "\n\n# ", table.doc);
                writeln!(text, "#[[{}]]", key.name).unwrap();
                write_keys(&mut text, table, "#");
            }
            _ => unreachable!("a file has sections only"),
        }
    }
    text
}

fn write_keys(text: &mut String, table: &Table, comment: &str) {
    for key in table.current_keys() {
        let Key { name, doc, example, .. } = key;
        let (comment, presence) = match key.presence {
            Presence::Required => (comment, "Required; for example:"),
            Presence::Optional => ("#", "Optional; for example:"),
            Presence::Defaulted => (comment, "Default:"),
            Presence::Later => unreachable!("current keys only"),
        };
        match key.kind {
            Kind::Choice(choice) | Kind::List(&Kind::Choice(choice)) => {
                write_comment(text, "\n# ", doc);
                for word in choice.words {
                    write_comment(text, "#   ", &format!("\"{}\": {}", word.text, word.doc));
                }
            }
            Kind::Table(nested) | Kind::Tables(nested) => {
                write_comment(text, "\n# ", doc);
                for Key { name, doc, presence, .. } in nested.current_keys() {
                    let optional = if *presence == Presence::Optional { "Optional. " } else { "" };
                    write_comment(text, "#   ", &format!("{name}: {optional}{doc}"));
                }
            }
            _ => write_comment(text, "\n# ", doc),
        }
        write_comment(text, "# ", presence);
        writeln!(text, "{comment}{name} = {example}").unwrap();
    }
}

/// Breaks lines at 100 characters.
fn write_comment(text: &mut String, begin: &str, sentences: &str) {
    const WIDTH: usize = 100;
    let indent = begin.trim_start_matches('\n');
    let mut line = String::new();
    text.push_str(begin);
    for word in sentences.split_whitespace() {
        if indent.len() + line.chars().count() + 1 + word.chars().count() > WIDTH {
            writeln!(text, "{line}").unwrap();
            text.push_str(indent);
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    writeln!(text, "{line}").unwrap();
}
