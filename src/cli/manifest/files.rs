//! The files that manifests are in.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use super::super::Usage;
use crate::admission::manifest::{self, Object};

/// Manifests of whole clusters are some megabytes.
const LARGEST: u64 = 64 << 20;
/// What is taken of a folder, as kubectl has it.
const EXTENSIONS: [&str; 3] = ["json", "yaml", "yml"];

/// One file, and the objects in it.
pub(super) struct Manifest {
    pub path: PathBuf,
    pub text: String,
    pub objects: Vec<Object>,
}

/// Reads files, the manifests in folders (not in folders of these), and, for `-`, standard input.
pub(super) fn read_all(paths: &[PathBuf]) -> Result<Vec<Manifest>, Usage> {
    let mut manifests = vec![];
    for path in paths {
        if path.is_dir() {
            for file in of_folder(path)? {
                manifests.push(read(file)?);
            }
        } else {
            manifests.push(read(path.clone())?);
        }
    }
    Ok(manifests)
}

fn of_folder(folder: &Path) -> Result<Vec<PathBuf>, Usage> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let entries = entries.map_err(|error| Usage(format!("{}: {error}", folder.display())))?;
    let is_manifest = |path: &PathBuf| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| EXTENSIONS.contains(&extension)) && path.is_file()
    };
    let mut files: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).filter(is_manifest).collect();
    if files.is_empty() {
        return Err(Usage(format!("{}: there is no file *.{} in this folder", folder.display(), EXTENSIONS.join(", *."))));
    }
    files.sort();
    Ok(files)
}

fn read(path: PathBuf) -> Result<Manifest, Usage> {
    let wrong = |problem: String| Usage(format!("{}: {problem}", path.display()));
    let mut text = String::new();
    let bounded = |reader: &mut dyn Read, text: &mut String| reader.take(LARGEST + 1).read_to_string(text);
    let read = if path.as_os_str() == "-" {
        bounded(&mut io::stdin().lock(), &mut text)
    } else {
        fs::File::open(&path).and_then(|mut file| bounded(&mut file, &mut text))
    };
    read.map_err(|error| wrong(error.to_string()))?;
    if text.len() as u64 > LARGEST {
        return Err(wrong(format!("it is larger than {LARGEST} bytes")));
    }
    let objects = manifest::objects(&text).map_err(|error| wrong(error.to_string()))?;
    Ok(Manifest { path, text, objects })
}
