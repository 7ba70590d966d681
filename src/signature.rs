//! How signatures are written down.
//!
//! `cosign` is the layout that every verifier of today reads: simple signing payloads as the layers of one manifest
//! under the tag `sha256-<hex>.sig`, in the image's own repository.

pub mod cosign;
pub mod notation;

use std::fmt;

use serde::{Deserialize, Serialize};

/// A way to write a signature, by its name in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The `.sig` tag.
    Cosign,
}

impl Format {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cosign => "cosign",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
