use std::path::Path;

use super::{
    Backend, Config, DEFAULT_TOML, LogFormat, Problem, Problems,
    outside::{Contents, Outside, Unreadable},
};

mod default_file;

/// A machine on which every file is there, and holds a secret that is 40 characters long, unless its name says otherwise.
fn imagined() -> Outside {
    let read_file = |path: &Path, limit| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let contents = |text: &str| Ok(Contents { bytes: text.into(), world_readable: name.starts_with("open") });
        match name.as_str() {
            "missing" => Err(Unreadable::Missing),
            "folder" => Err(Unreadable::NotAFile),
            "huge" => Err(Unreadable::TooLarge(limit)),
            "denied" => Err(Unreadable::Io(std::io::ErrorKind::PermissionDenied.into())),
            "empty" => contents(""),
            "newline" => contents("\n"),
            "short" => contents("hunter2\n"),
            "spaced" => contents("hunter2 is a password\n"),
            "binary" => Ok(Contents { bytes: vec![0xff; 40], world_readable: false }),
            _ => contents(&format!("{}\n", "hunter2+".repeat(5))),
        }
    };
    Outside::imagined(read_file, |name| (name == "TOKEN").then(|| "hunter2+".repeat(5)))
}

fn parse(text: &str) -> Result<(Config, Vec<Problem>), Problems> {
    Config::parse_with(text, Path::new("countersign.toml"), imagined())
}

#[test]
fn an_empty_file_and_the_default_file_mean_the_same() {
    let (empty, warnings) = parse("").unwrap();
    assert!(warnings.is_empty());
    let default = Config::embedded_default();
    assert_eq!(format!("{empty:?}"), format!("{default:?}"));
    assert_eq!(default.server.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(default.queue.backend, Backend::Embedded { path: "/var/lib/countersign".into() });
    assert_eq!(default.log.format, LogFormat::Human);
    assert!(parse(DEFAULT_TOML).unwrap().1.is_empty());
}
