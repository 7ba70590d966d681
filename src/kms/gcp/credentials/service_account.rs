use aws_lc_rs::{rand::SystemRandom, rsa::KeyPair, signature::RSA_PKCS1_SHA256};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use jiff::Timestamp;
use rsa::pkcs8::SecretDocument;
use secrecy::{ExposeSecret, zeroize::Zeroizing};
use serde_json::{Value, json};

use super::{SCOPE, Source, file::ServiceAccount, name_of};
use crate::kms::{
    bearer::{Bearer, Issuer, form},
    caller::TheirClock,
    refresh::CredentialsError,
};

/// The longest that is taken.
const SECONDS: i64 = 3600;

impl Source {
    /// The JWT that a service account signs with its own key, exchanged for a token (RFC 7523 section 2.1).
    /// <https://developers.google.com/identity/protocols/oauth2/service-account>
    pub(super) async fn of_service_account(&self, account: &ServiceAccount) -> Result<Bearer, CredentialsError> {
        let key = account.key()?;
        let issuer = Issuer { name: &name_of(&account.token_uri), secrets: &[], now: self.clock.now() };
        let time = TheirClock::new(self.clock.clone());
        let post = async || {
            let assertion = account.assertion(&key, time.now());
            let asked = [("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer"), ("assertion", assertion.as_str())];
            let issuer = Issuer { secrets: &[&assertion], ..issuer };
            let answer = issuer.ask(form(self.outside.post(account.token_uri.clone()), &asked)).await?;
            Ok::<_, CredentialsError>((issuer.read(&answer), answer))
        };
        let (mut read, answer) = post().await?;
        // A clock that is wrong makes the JWT one of another time: once more by theirs.
        if read.is_err() && time.set_by(&answer, &name_of(&account.token_uri)) {
            read = post().await?.0;
        }
        read
    }
}

impl ServiceAccount {
    fn key(&self) -> Result<KeyPair, CredentialsError> {
        let document = SecretDocument::from_pem(self.key.expose_secret()).ok();
        let key = document.and_then(|(_, der)| KeyPair::from_pkcs8(der.as_bytes()).ok());
        key.ok_or_else(|| CredentialsError::Wrong(format!("the private_key of {} is no RSA key of PKCS#8 in PEM", self.email)))
    }

    /// Good for a token, so as secret as one.
    fn assertion(&self, key: &KeyPair, time: Timestamp) -> Zeroizing<String> {
        let part = |value: Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let since_1970 = time.as_second();
        let header = json!({ "alg": "RS256", "typ": "JWT", "kid": self.key_id });
        let claims = json!({
            "iss": self.email, "scope": SCOPE, "aud": self.token_uri.as_str(), "iat": since_1970, "exp": since_1970 + SECONDS,
        });
        let signed = format!("{}.{}", part(header), part(claims));
        let mut signature = vec![0; key.public_modulus_len()];
        key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), signed.as_bytes(), &mut signature)
            .expect("the buffer has the length of the key's modulus");
        Zeroizing::new(format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature)))
    }
}
