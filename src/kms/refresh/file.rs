use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use secrecy::{SecretString, zeroize::Zeroizing};

use super::CredentialsError;

/// The text of a file that may hold secrets.
pub(in crate::kms) type Text = Zeroizing<String>;

const LARGEST_FILE: u64 = 1024 * 1024;

/// Reads a file of settings or credentials; `None` if it is not there.
pub(in crate::kms) fn text_of(path: &Path) -> Result<Option<Text>, CredentialsError> {
    let mut text = Text::default();
    match File::open(path).and_then(|file| file.take(LARGEST_FILE).read_to_string(&mut text)) {
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CredentialsError::Unreadable { file: path.to_owned(), why: error.to_string() }),
    }
}

/// The token that a file holds. Read each time that it is needed: tokens are exchanged in place.
pub(in crate::kms) fn token_of(file: &Path) -> Result<SecretString, CredentialsError> {
    let text = text_of(file)?;
    let token = text.as_deref().map(|text| text.trim()).unwrap_or_default();
    if !is_sendable(token) {
        return Err(CredentialsError::NoToken { file: file.to_owned() });
    }
    Ok(token.into())
}

/// Whether a text can stand in a header, and is there at all.
pub(in crate::kms) fn is_sendable(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic())
}
