//! Who may come in: secrets compared in constant time.

use std::fmt;

use base64::{Engine, engine::general_purpose::STANDARD};
use http::{HeaderMap, header::AUTHORIZATION};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};

/// What a sender has to present.
#[derive(Debug, Clone)]
pub enum Auth {
    /// `Authorization: Bearer <token>`; any of these, so that secrets can be changed without losing an event.
    Bearer { tokens: Vec<SecretString> },
    /// `Authorization: Basic <base64 of username:password>`.
    Basic { username: String, password: SecretString },
}

/// SHA-256 of every credential that opens a door. Equal lengths leave nothing about the secret for a clock to measure.
pub(super) struct Accepted(Vec<[u8; 32]>);

impl Accepted {
    pub(super) fn of(auth: &Auth) -> Self {
        Self(match auth {
            // An empty secret is none, whoever let it through.
            Auth::Bearer { tokens } => {
                tokens.iter().map(SecretString::expose_secret).filter(|token| !token.is_empty()).map(bearer).collect()
            }
            Auth::Basic { password, .. } if password.expose_secret().is_empty() => Vec::new(),
            Auth::Basic { username, password } => {
                vec![basic(&[username.as_bytes(), b":", password.expose_secret().as_bytes()])]
            }
        })
    }

    /// As much work as a real door's, and no way in: nothing is known to hash to this.
    pub(super) fn nobody() -> &'static Self {
        static NOBODY: std::sync::LazyLock<Accepted> = std::sync::LazyLock::new(|| Accepted(vec![[0; 32]]));
        &NOBODY
    }

    /// Whether `presented` is one of them. All are compared, whichever fits.
    pub(super) fn holds(&self, presented: &[u8; 32]) -> bool {
        self.0
            .iter()
            .fold(false, |found, accepted| aws_lc_rs::constant_time::verify_slices_are_equal(accepted, presented).is_ok() | found)
    }
}

impl fmt::Debug for Accepted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} secrets>", self.0.len())
    }
}

/// The hash of what a request presents; that of nothing, which no door accepts, if it presents nothing readable or two
/// things at once.
pub(super) fn presented(headers: &HeaderMap) -> [u8; 32] {
    const NOTHING: [u8; 32] = [0xff; 32];
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return NOTHING };
    let Ok(value) = value.to_str() else { return NOTHING };
    let Some((scheme, credential)) = value.split_once(' ') else { return NOTHING };
    let credential = credential.trim_matches(' ');
    if scheme.eq_ignore_ascii_case("bearer") {
        bearer(credential)
    } else if scheme.eq_ignore_ascii_case("basic") {
        STANDARD.decode(credential).map_or(NOTHING, |credential| basic(&[&credential]))
    } else {
        NOTHING
    }
}

fn bearer(token: &str) -> [u8; 32] {
    hash(b"bearer", &[token.as_bytes()])
}

fn basic(credential: &[&[u8]]) -> [u8; 32] {
    hash(b"basic", credential)
}

/// The scheme is hashed with it: a password is no token.
fn hash(scheme: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(scheme);
    hasher.update([0]);
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn opens(auth: &Auth, header: &str) -> bool {
        let headers = HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_str(header).unwrap())]);
        Accepted::of(auth).holds(&presented(&headers))
    }

    #[test]
    fn any_of_the_tokens_opens_and_nothing_else_does() {
        let auth = Auth::Bearer { tokens: vec!["old".into(), "new".into(), "".into()] };
        for header in ["Bearer old", "Bearer new", "bearer new", "BEARER  new"] {
            assert!(opens(&auth, header), "{header}");
        }
        for header in
            ["", "Bearer", "Bearer ", "Bearer  ", "Bearer ol", "Bearer oldnew", "old", "Basic old", "Bearer OLD", "Digest old"]
        {
            assert!(!opens(&auth, header), "{header}");
        }
    }

    #[test]
    fn basic_opens_by_name_and_password() {
        let auth = Auth::Basic { username: "registry".into(), password: "se:cret".into() };
        let header = |text: &str| format!("Basic {}", STANDARD.encode(text));
        assert!(opens(&auth, &header("registry:se:cret")));
        for text in ["registry:", "registry", ":se:cret", "registry:secret", ""] {
            assert!(!opens(&auth, &header(text)), "{text}");
        }
        assert!(!opens(&auth, "Basic %%%"));
        let unset = Auth::Basic { username: "registry".into(), password: "".into() };
        assert!(!opens(&unset, &header("registry:")));
        assert!(!opens(&auth, "Bearer registry:se:cret"));
    }

    #[test]
    fn two_credentials_at_once_open_nothing() {
        let mut headers = HeaderMap::new();
        headers.append(AUTHORIZATION, HeaderValue::from_static("Bearer a"));
        headers.append(AUTHORIZATION, HeaderValue::from_static("Bearer a"));
        assert!(!Accepted::of(&Auth::Bearer { tokens: vec!["a".into()] }).holds(&presented(&headers)));
    }

    #[test]
    fn secrets_are_not_printed() {
        let auth = Auth::Bearer { tokens: vec!["hush".into()] };
        let printed = format!("{auth:?} {:?}", Accepted::of(&auth));
        assert!(!printed.contains("hush"), "{printed}");
    }
}
