//! From a URL to an open connection.

use std::{
    fmt, io,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_rs::Runtime;
use lapin::{
    AsyncTcpStream, Connection, ConnectionProperties, ErrorKind,
    uri::{AMQPAuthority, AMQPScheme, AMQPUri, SASLMechanism},
};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::timeout;
use tokio_rustls::rustls::{
    self, AlertDescription, CertificateError, ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    returns::Returns,
    session::unavailable,
    wire::{Kit, Patience, Wire},
};
use crate::Error;

/// How long a broker may take until it has let us in.
const LIMIT: Duration = Duration::from_secs(10);
/// In seconds, unless the URL or the broker say less: [`Patience`] has what follows from it.
const HEARTBEAT: u16 = 10;
/// The largest frame, in bytes; lapin keeps room for 32 of them each way. Bodies are cut into as many as it takes.
const FRAME: u32 = 32 * 1024;

/// How the brokers are reached. Asked for at each connect, so that what was rotated is used.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// `amqp://USER:PASSWORD@HOST:PORT/VHOST`, or `amqps://`. Tried in turn. With `?auth_mechanism=external` the client
    /// certificate says who we are.
    pub urls: Vec<SecretString>,
    /// PEM: whom to believe instead of the system's roots.
    pub ca: Option<Vec<u8>>,
    /// PEM: our certificate with those that lead to its root, and its key.
    pub identity: Option<(Vec<u8>, SecretString)>,
}

/// One broker.
pub(super) struct Address {
    uri: AMQPUri,
    tls: Option<Arc<ClientConfig>>,
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown())
    }
}

impl Address {
    /// Host and port, for people.
    pub fn shown(&self) -> String {
        format!("{}:{}", self.uri.authority.host, self.uri.authority.port)
    }
}

/// The brokers, in their order.
pub(super) fn addresses(access: &Access) -> Result<Vec<Address>, Error> {
    let mut tls = None;
    let mut addresses = Vec::with_capacity(access.urls.len());
    for (place, url) in access.urls.iter().enumerate() {
        let wrong = || Error::Unavailable {
            // What is wrong with it may be the password.
            what: format!("URL {} of the brokers is none: amqp://USER:PASSWORD@HOST:5672/VHOST, or amqps://", place + 1),
            source: None,
        };
        let mut uri: AMQPUri = url.expose_secret().trim().parse().map_err(|_| wrong())?;
        if uri.authority.host.is_empty() {
            return Err(wrong());
        }
        uri.query.heartbeat.get_or_insert(HEARTBEAT);
        uri.query.frame_max.get_or_insert(FRAME);
        uri.query.auth_mechanism.get_or_insert(SASLMechanism::Plain);
        if uri.scheme == AMQPScheme::AMQPS && tls.is_none() {
            tls = Some(client_config(access)?);
        }
        let tls = tls.clone().filter(|_| uri.scheme == AMQPScheme::AMQPS);
        addresses.push(Address { uri, tls });
    }
    if addresses.is_empty() {
        return Err(Error::Unavailable { what: "no URL of a broker is configured".to_owned(), source: None });
    }
    Ok(addresses)
}

fn client_config(access: &Access) -> Result<Arc<ClientConfig>, Error> {
    let wrong = |what: &str, source: Option<Box<dyn std::error::Error + Send + Sync>>| Error::Unavailable {
        what: what.to_owned(),
        source,
    };
    let mut roots = RootCertStore::empty();
    if let Some(pem) = &access.ca {
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|error| wrong("the broker's `ca` is no PEM", Some(error.into())))?;
            roots.add(certificate).map_err(|error| wrong("the broker's `ca` is no certificate", Some(error.into())))?;
        }
        if roots.is_empty() {
            return Err(wrong("the broker's `ca` holds no certificate", None));
        }
    } else {
        // What cannot be used of the system's is left out; without any, no broker is believed.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong("TLS cannot be set up", Some(error.into())))?
        .with_root_certificates(roots);
    let config = match &access.identity {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificate).collect();
            let chain = chain.map_err(|error| wrong("the client certificate is no PEM", Some(error.into())))?;
            // The parser's error may show what it read.
            let key = PrivateKeyDer::from_pem_slice(key.expose_secret().as_bytes())
                .map_err(|_| wrong("the client certificate's key is no PEM", None))?;
            config
                .with_client_auth_cert(chain, key)
                .map_err(|error| wrong("the client certificate and its key cannot be used", Some(error.into())))?
        }
    };
    Ok(Arc::new(config))
}

/// One connection, which ends at the latest when `cut` is cancelled, and what comes back on it.
pub(super) async fn open(
    address: &Address,
    name: &str,
    tracker: &TaskTracker,
    cut: &CancellationToken,
) -> Result<(Connection, Returns), Error> {
    let what = |cause: Option<&io::Error>| {
        let cure =
            cause.and_then(|cause| cure(cause, address.tls.as_deref())).map(|cure| format!(": {cure}")).unwrap_or_default();
        format!("{} cannot be reached, or does not let us in{cure}", address.shown())
    };
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let AMQPAuthority { host, port, .. } = &address.uri.authority;
    let patience = Patience::new(address.uri.query.heartbeat.unwrap_or(HEARTBEAT));
    let returns = Returns::default();
    let wire = Wire::open(host, *port, address.tls.clone(), cut.clone(), patience.clone(), returns.clone());
    let connected = timeout(LIMIT, wire).await;
    let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let wire = connected.map_err(|error| Error::Unavailable { what: what(Some(&error)), source: Some(error.into()) })?;
    // lapin would connect itself, but leaves a task behind for each time that it could not.
    let wire = Mutex::new(Some(wire));
    let connect = async move |_: AMQPUri, _: Runtime<Kit>| {
        let wire = wire.lock().expect("nothing panics while it holds the lock").take();
        wire.map(AsyncTcpStream::Plain).ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionAborted).into())
    };
    let connecting = Connection::connector(address.uri.clone(), Runtime::new(Kit::new(tracker.clone())), connect, properties);
    match timeout(2 * LIMIT, connecting).await {
        // With TLS 1.3 it is only now that the broker says what it thinks of our certificate.
        Ok(connected) => {
            let connection = connected.map_err(|error| match error.kind() {
                ErrorKind::IOError(cause) => unavailable(what(Some(&**cause)), error),
                _ => unavailable(what(None), error),
            })?;
            patience.agree(connection.configuration().heartbeat());
            Ok((connection, returns))
        }
        Err(_) => Err(Error::Unavailable { what: what(None), source: None }),
    }
}

/// What an administrator does about a failure of TLS.
fn cure(error: &io::Error, tls: Option<&ClientConfig>) -> Option<&'static str> {
    use CertificateError as Wrong;
    if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe) {
        // What it said before it hung up may be lost, because we had begun to speak.
        return tls.map(|tls| {
            if tls.client_auth_cert_resolver.has_certs() {
                "it hangs up once it has seen our client certificate; `certificate` in `tls` may have expired, or it has to know \
                 who signed it"
            } else {
                "it hangs up without a word, and may want a client certificate; name it as `certificate` and `key` in `tls`"
            }
        });
    }
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match error {
        rustls::Error::InvalidCertificate(Wrong::UnknownIssuer) => {
            "its certificate is of nobody that we believe; `ca` in `tls` has to name who signed it"
        }
        rustls::Error::InvalidCertificate(Wrong::Expired | Wrong::ExpiredContext { .. }) => {
            "its certificate has expired; the broker needs a new one"
        }
        rustls::Error::InvalidCertificate(Wrong::NotValidForName | Wrong::NotValidForNameContext { .. }) => {
            "its certificate is for other names; reach it by one of those"
        }
        rustls::Error::AlertReceived(AlertDescription::CertificateRequired | AlertDescription::HandshakeFailure) => {
            "it wants a client certificate; name it as `certificate` and `key` in `tls`"
        }
        rustls::Error::AlertReceived(AlertDescription::CertificateExpired) => {
            "our client certificate has expired; renew `certificate` in `tls`"
        }
        rustls::Error::AlertReceived(
            AlertDescription::UnknownCA | AlertDescription::BadCertificate | AlertDescription::CertificateUnknown,
        ) => "it does not believe our client certificate; it has to know who signed `certificate` in `tls`",
        _ => return None,
    })
}
