//! The folder of an embedded queue: its lock, and a database file that is ours.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use super::store;
use crate::Error;

const LOCK: &str = "queue.lock";
const DATABASE: &str = "queue.db";

/// A folder that no other process uses for as long as this lives.
pub(super) struct Folder {
    path: PathBuf,
    /// Locked (flock): freed by the kernel however this process ends.
    lock: File,
}

impl Folder {
    /// Makes the folder if needed and locks it, or says who has it.
    pub fn lock(path: &Path) -> Result<Self, Error> {
        let unusable = |cause: io::Error| Error::Unavailable {
            what: format!("{} must be a folder that this user may write to", path.display()),
            source: Some(cause.into()),
        };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(unusable)?;
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join(LOCK))
            .map_err(unusable)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Who holds it is a courtesy: an unreadable answer is no answer.
                let _ = lock.take(32).read_to_string(&mut holder);
                return Err(Error::InUse { path: path.display().to_string(), holder: holder.trim().parse().ok() });
            }
            Err(TryLockError::Error(cause)) => return Err(unusable(cause)),
        }
        lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(unusable)?;
        Ok(Self { path: path.to_path_buf(), lock })
    }

    /// The path of the database: there, and ours as far as its first bytes say. A new one is made if there is none.
    pub fn database(&self) -> Result<PathBuf, Error> {
        let path = self.path.join(DATABASE);
        match File::open(&path) {
            Ok(file) => inspect(&path, file)?,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => self.create(&path)?,
            Err(cause) => return Err(unreadable(&path, "it cannot be opened", Some(cause.into()))),
        }
        Ok(path)
    }

    /// Under another name first, so that whatever has the right name is complete.
    fn create(&self, path: &Path) -> Result<(), Error> {
        // SQLite would take the pages of a left-behind log for those of the new file.
        let log = with_suffix(path, "-wal");
        if log.exists() {
            let what = format!("it is missing, but its log {} is there: bring it back, or remove the log too", log.display());
            return Err(unreadable(path, &what, None));
        }
        let new = with_suffix(path, ".new");
        let made = (|| {
            for stale in [&new, &with_suffix(&new, "-journal")] {
                match std::fs::remove_file(stale) {
                    Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(cause),
                    _ => {}
                }
            }
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            store::create(&new).map_err(io::Error::other)?;
            file.sync_all()?;
            std::fs::rename(&new, path)?;
            // A name is durable when its folder is: the file's, and the folder's own, which may be new. The latter may be one
            // that we must not read.
            File::open(&self.path)?.sync_all()?;
            match File::open(self.path.join("..")) {
                Ok(parent) => parent.sync_all(),
                Err(_) => Ok(()),
            }
        })();
        made.map_err(|cause| Error::Unavailable {
            what: format!("{} cannot be made", path.display()),
            source: Some(cause.into()),
        })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What another thread has forked, and is no other program yet, has this file open as well: that we close it does not free it.
        let _ = self.lock.unlock();
    }
}

/// Refuses what is no queue of a version that we know by its header, before SQLite could change anything in it.
///
/// The header is that of the SQLite file format, section 1.3: the user version at byte 60, the application id at 68.
fn inspect(path: &Path, file: File) -> Result<(), Error> {
    let mut header = Vec::new();
    file.take(100).read_to_end(&mut header).map_err(|cause| unreadable(path, "reading it failed", Some(cause.into())))?;
    let number = |at: usize| header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_be_bytes);
    if !header.starts_with(b"SQLite format 3\0") || number(68) != Some(store::APPLICATION) {
        return Err(unreadable(path, "it is something else, and was left as it is: move it away", None));
    }
    match number(60) {
        // What it really is may be in the log beside it: that is looked at when it is opened.
        Some(1..=store::VERSION) => Ok(()),
        version => Err(wrong_version(path, version.unwrap_or_default())),
    }
}

/// The file is a queue, of a version that this program does not know.
pub(super) fn wrong_version(path: &Path, version: i32) -> Error {
    let what = format!(
        "it is of version {version}, and this program reads versions up to {}: use the program that wrote it, or a newer one",
        store::VERSION
    );
    unreadable(path, &what, None)
}

pub(super) fn unreadable(path: &Path, what: &str, source: Option<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Unreadable { path: path.display().to_string(), what: what.into(), source }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
