//! What a configuration refers to outside of itself: files and environment variables. In one place, so that tests can
//! stand in for the machine, and so that every read is bounded.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

/// Files and environment as seen from the folder of a configuration file.
pub(crate) struct Outside {
    folder: PathBuf,
    read_file: Box<ReadFile>,
    read_env: Box<ReadEnv>,
}

type ReadFile = dyn Fn(&Path, u64) -> Result<Contents, Unreadable>;
type ReadEnv = dyn Fn(&str) -> Option<String>;

/// What a file holds.
#[derive(Debug)]
pub(crate) struct Contents {
    pub bytes: Vec<u8>,
    /// Everybody on this machine may read it.
    pub world_readable: bool,
}

/// Why a file could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("there is no such file")]
    Missing,
    #[error("it is not a file")]
    NotAFile,
    #[error("it is larger than {0} bytes")]
    TooLarge(u64),
    #[error("it cannot be read: {0}")]
    Io(io::Error),
}

impl Outside {
    /// The machine itself; relative paths are relative to `folder`.
    pub(crate) fn machine(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), read_file: Box::new(read_file), read_env: Box::new(|name| std::env::var(name).ok()) }
    }

    /// A machine made up for a test.
    #[cfg(test)]
    pub(crate) fn imagined(
        read_file: impl Fn(&Path, u64) -> Result<Contents, Unreadable> + 'static,
        read_env: impl Fn(&str) -> Option<String> + 'static,
    ) -> Self {
        Self { folder: "/etc/countersign".into(), read_file: Box::new(read_file), read_env: Box::new(read_env) }
    }

    /// Where a path that stands in the configuration leads.
    pub(crate) fn resolve(&self, path: &str) -> PathBuf {
        self.folder.join(path)
    }

    /// A whole file of at most `limit` bytes.
    pub(crate) fn read(&self, path: &Path, limit: u64) -> Result<Contents, Unreadable> {
        (self.read_file)(path, limit)
    }

    /// An environment variable; None if it is not set, or is not UTF-8.
    pub(crate) fn env(&self, name: &str) -> Option<String> {
        // The standard library panics on names that no variable can have.
        if name.is_empty() || name.contains(['=', '\0']) { None } else { (self.read_env)(name) }
    }
}

/// Reads a regular file of at most `limit` bytes. Pipes and devices are refused before they are opened: reading one could
/// wait for ever.
pub(crate) fn read_file(path: &Path, limit: u64) -> Result<Contents, Unreadable> {
    let not_read = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Unreadable::Missing,
        _ => Unreadable::Io(error),
    };
    let metadata = fs::metadata(path).map_err(not_read)?;
    if !metadata.is_file() {
        return Err(Unreadable::NotAFile);
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes)).map_err(not_read)?;
    if bytes.len() as u64 > limit {
        return Err(Unreadable::TooLarge(limit));
    }
    Ok(Contents { bytes, world_readable: metadata.permissions().mode() & 0o004 != 0 })
}
