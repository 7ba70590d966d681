//! Connections to a registry: kept alive, by TLS with the system's and the configured authorities, through the proxy that
//! the environment names.
//!
//! hyper's own client rather than reqwest: a signature takes half a dozen small requests, and of what each costs this process
//! a third was spent above hyper.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use http::{Uri, uri::Scheme};
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::{
    client::{
        legacy::{
            self,
            connect::{HttpConnector, proxy::Tunnel},
        },
        proxy::matcher::Matcher,
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::net::TcpStream;
use tokio_rustls::rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, pem::PemObject},
};
use tower::Service;

use super::Settings;

pub(super) type Client = legacy::Client<Connector, Full<Bytes>>;
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A client for the registry of `settings`, or what is wrong with them.
pub(super) fn client(settings: &Settings, proxies: Matcher) -> Result<Client, String> {
    /// Shorter than the idle time-outs of common servers and balancers (60 s and more), so that a request seldom meets a
    /// connection that is just being closed.
    const IDLE: Duration = Duration::from_secs(45);
    const MOST_IDLE: usize = 256;

    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_keepalive(Some(IDLE));
    let tls = Arc::new(tls(settings)?);
    let connector = Connector {
        direct: HttpsConnector::from((tcp.clone(), tls.clone())),
        tcp,
        tls,
        proxies: Arc::new(proxies),
        limit: settings.timeouts.connect,
    };
    Ok(legacy::Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(MOST_IDLE)
        .build(connector))
}

fn tls(settings: &Settings) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    if let Some(bundle) = &settings.ca {
        for certificate in CertificateDer::pem_slice_iter(bundle) {
            let certificate = certificate.map_err(|error| format!("the CA bundle is no PEM file: {error}"))?;
            roots.add(certificate).map_err(|error| format!("a certificate of the CA bundle cannot be used: {error}"))?;
        }
        if roots.is_empty() {
            return Err("the CA bundle holds no PEM certificate".to_owned());
        }
    }
    // What the system has and we cannot read does not matter as long as something is left.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() && settings.url.scheme() == "https" {
        return Err("no certificate authority to check the registry's by: install the system's (ca-certificates), or name \
                    the registry's own with `ca`"
            .to_owned());
    }
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS cannot be set up: {error}"))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// Makes connections, directly or by CONNECT through the proxy that `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` name. Plain
/// http goes directly: it is for registries nearby, and a proxy could read what it carries.
#[derive(Clone)]
pub(super) struct Connector {
    direct: HttpsConnector<HttpConnector>,
    tcp: HttpConnector,
    tls: Arc<ClientConfig>,
    proxies: Arc<Matcher>,
    limit: Duration,
}

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<TokioIo<TcpStream>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, target: Uri) -> Self::Future {
        let proxy = if target.scheme() == Some(&Scheme::HTTPS) { self.proxies.intercept(&target) } else { None };
        let connecting = match proxy {
            None => self.direct.call(target),
            Some(proxy) => {
                let mut tunnel = Tunnel::new(proxy.uri().clone(), self.tcp.clone());
                if let Some(account) = proxy.basic_auth() {
                    tunnel = tunnel.with_auth(account.clone());
                }
                HttpsConnector::from((tunnel, self.tls.clone())).call(target)
            }
        };
        let limit = self.limit;
        async move { tokio::time::timeout(limit, connecting).await.map_err(|_| format!("no connection within {limit:?}"))? }
            .boxed()
    }
}
