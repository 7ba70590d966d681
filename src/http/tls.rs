use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use secrecy::{ExposeSecret, SecretString};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

use super::Error;

/// What a listener proves its name with: TLS 1.2 and 1.3, HTTP/1.1 by ALPN. Clones share the certificate.
#[derive(Clone)]
pub struct Tls(Arc<RwLock<Arc<ServerConfig>>>);

impl Tls {
    /// `certificates` is PEM, the server's own first and then its issuers; `key` is PEM (PKCS#8, PKCS#1 or SEC1) without a
    /// passphrase.
    ///
    /// # Errors
    /// When either is no such PEM, or they do not belong together.
    pub fn from_pem(certificates: &[u8], key: &SecretString) -> Result<Self, Error> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(certificates)
            .collect::<Result<_, _>>()
            .map_err(|error| Error::Certificate(error.to_string()))?;
        if chain.is_empty() {
            return Err(Error::Certificate("it holds no certificate".into()));
        }
        // What the parser says of a key could quote it.
        let key = PrivateKeyDer::from_pem_slice(key.expose_secret().as_bytes())
            .map_err(|_| Error::Key("it holds no private key".into()))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("the provider has cipher suites for TLS 1.2 and 1.3")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|error| Error::Key(error.to_string()))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(Arc::new(RwLock::new(Arc::new(config)))))
    }

    /// Uses the certificate of `renewed` from the next connection on, here and in every clone.
    pub fn replace(&self, renewed: &Self) {
        let renewed = renewed.current();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = renewed;
    }

    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.current().into()
    }

    fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}
