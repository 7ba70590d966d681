use std::{fs::File, io, io::Read, path::Path, sync::Arc};

use super::{Error, Pin, WitnessSettings, trust};
use crate::kms::{PublicKey, create_file, replace_file};

/// No public key comes near it.
const LARGEST_FILE: u64 = 64 * 1024;

/// Keeps the key on the first opening, and refuses another one later, unless the kept one is listed under `verify`: that is a
/// rotation, and the new key is kept instead.
pub(super) fn hold(settings: &WitnessSettings, found: &PublicKey) -> Result<(), Error> {
    let path = match &settings.pin {
        None => return Ok(()),
        Some(Pin::Kept(path)) => path,
        Some(Pin::Given(path)) => {
            let missing = || io::Error::from(io::ErrorKind::NotFound);
            let pinned = read(settings)?.ok_or_else(|| Error::Pin {
                witness: settings.name.clone(),
                pin: path.clone(),
                what: "read",
                source: missing(),
            })?;
            return compare(settings, path, &pinned, found);
        }
    };
    let failed = |what| move |source| Error::Pin { witness: settings.name.clone(), pin: path.clone(), what, source };
    match read(settings)? {
        Some(pinned) if pinned == *found => Ok(()),
        Some(pinned) => {
            compare_or_rotation(settings, path, &pinned, found)?;
            tracing::info!(witness = settings.name, old = pinned.fingerprint(), new = found.fingerprint(), "the key was rotated");
            replace_file(path, found.to_pem().as_bytes(), 0o644).map_err(failed("replaced"))
        }
        None => match create_file(path, found.to_pem().as_bytes(), 0o644) {
            // Another process was first: hold the key against what that one kept.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match read(settings)? {
                Some(pinned) => compare_or_rotation(settings, path, &pinned, found),
                None => Err(failed("written")(error)),
            },
            result => result.map_err(failed("written")),
        },
    }
}

/// The kept key, if there is one.
pub(super) fn read(settings: &WitnessSettings) -> Result<Option<PublicKey>, Error> {
    let Some(path) = settings.pin.as_ref().map(Pin::path) else { return Ok(None) };
    let text = match read_text(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Pin { witness: settings.name.clone(), pin: path.to_owned(), what: "read", source }),
    };
    let parsed = PublicKey::from_pem(&text);
    parsed.map(Some).map_err(|source| Error::PinDamaged { witness: settings.name.clone(), pin: path.to_owned(), source })
}

/// Whether the found key may stand where the pinned one did.
pub(super) fn compare_or_rotation(
    settings: &WitnessSettings,
    path: &Path,
    pinned: &PublicKey,
    found: &PublicKey,
) -> Result<(), Error> {
    if trust::configured(&settings.name, &settings.verify)?.iter().any(|(key, _)| key == pinned) {
        return Ok(());
    }
    compare(settings, path, pinned, found)
}

fn compare(settings: &WitnessSettings, path: &Path, pinned: &PublicKey, found: &PublicKey) -> Result<(), Error> {
    if pinned == found {
        return Ok(());
    }
    Err(Error::KeyChanged {
        witness: settings.name.clone(),
        key: Arc::new(settings.key.clone()),
        pin: path.to_owned(),
        pinned: pinned.fingerprint().to_owned(),
        found: found.fingerprint().to_owned(),
    })
}

fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(LARGEST_FILE).read_to_string(&mut text)?;
    Ok(text)
}
