use std::{path::PathBuf, sync::Arc};

use http::StatusCode;

use crate::kms::{
    Error, KeyUri,
    exchange::{NoAnswer, one_line},
};

/// Why there are no credentials. Says where they were looked for, never what was found.
#[derive(Debug, Clone, thiserror::Error)]
pub(in crate::kms) enum CredentialsError {
    /// Nothing is set up; says what could be.
    #[error("{0}")]
    None(String),
    #[error("{one} is set without {other}")]
    Half { one: &'static str, other: &'static str },
    /// A setting that contradicts another or leads nowhere.
    #[error("{0}")]
    Wrong(String),
    #[error("{setting} of profile {profile} is not supported: {instead}")]
    Unsupported { setting: &'static str, profile: String, instead: &'static str },
    #[error("the credentials from {from} hold characters that cannot be sent, or nothing: {what}")]
    Unsendable { from: String, what: &'static str },
    #[error("{} cannot be read: {why}", file.display())]
    Unreadable { file: PathBuf, why: String },
    #[error("{} holds no token", file.display())]
    NoToken { file: PathBuf },
    #[error("no answer from {from}: {why}")]
    Unanswered { from: String, why: String },
    /// It has a fault of its own, or asks for fewer requests.
    #[error("{from} could not give credentials just now: {what}")]
    Passing { from: String, what: String },
    #[error("{from} gives no credentials: {what}")]
    Refused { from: String, what: String },
    #[error("{from} answered something that cannot be right: {what}")]
    BadAnswer { from: String, what: String },
}

impl CredentialsError {
    /// Whether the same may go well a little later.
    pub(in crate::kms) fn is_passing(&self) -> bool {
        match self {
            Self::Unanswered { .. } | Self::Passing { .. } | Self::BadAnswer { .. } => true,
            Self::None(_)
            | Self::Half { .. }
            | Self::Wrong(_)
            | Self::Unsupported { .. }
            | Self::Unsendable { .. }
            | Self::Unreadable { .. }
            | Self::NoToken { .. }
            | Self::Refused { .. } => false,
        }
    }

    /// What it means for whoever wanted to use the key.
    pub(in crate::kms) fn of_key(&self, key: Arc<KeyUri>) -> Error {
        let what = self.to_string();
        if self.is_passing() { Error::Transient { key, what } } else { Error::Credentials { key, what } }
    }

    pub(in crate::kms) fn unanswered(from: &str, error: NoAnswer) -> Self {
        match error {
            NoAnswer::Transport(why) => Self::Unanswered { from: from.to_owned(), why },
            long @ NoAnswer::TooLong { .. } => Self::BadAnswer { from: from.to_owned(), what: long.to_string() },
        }
    }

    /// An answer that is no success, sorted by its status.
    pub(in crate::kms) fn of_status(from: &str, status: StatusCode, said: &str) -> Self {
        let said = one_line(said, 300);
        let what = format!("HTTP {}{}{said}", status.as_u16(), if said.is_empty() { "" } else { ": " });
        let from = from.to_owned();
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::REQUEST_TIMEOUT {
            Self::Passing { from, what }
        } else {
            Self::Refused { from, what }
        }
    }
}
