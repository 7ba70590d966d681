//! A registry by https whose certificate comes from an authority of its own.

use std::{fs, io, net::SocketAddr, process::Command};

use hyper_util::client::proxy::matcher::Matcher;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
    server::TlsStream,
};

use super::*;

/// An authority, and a certificate of it for 127.0.0.1.
struct Authority(TempDir);

impl Authority {
    fn new() -> Self {
        const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
        let this = Self(TempDir::new().unwrap());
        fs::write(this.0.path().join("san"), "subjectAltName=IP:127.0.0.1").unwrap();
        this.openssl(&format!("req -x509 {KEY} -subj /CN=authority -days 2 -keyout ca.key -out ca.pem"));
        this.openssl(&format!("req {KEY} -subj /CN=registry -keyout key.pem -out request.pem"));
        this.openssl(
            "x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san -out certificate.pem",
        );
        this
    }

    fn openssl(&self, arguments: &str) {
        let done = Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(self.0.path())
            .output()
            .expect("openssl must be installed: apt-get install openssl");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.0.path().join(name)).unwrap()
    }

    fn acceptor(&self) -> TlsAcceptor {
        let provider = tokio_rustls::rustls::crypto::aws_lc_rs::default_provider();
        let certificate = CertificateDer::from_pem_slice(&self.read("certificate.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_slice(&self.read("key.pem")).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}

struct TlsListener(TcpListener, TlsAcceptor);

impl axum::serve::Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, address) = self.0.accept().await.unwrap();
            // A client that does not trust us hangs up here.
            if let Ok(stream) = self.1.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// Serves `router` by https, until the set is dropped.
async fn serve(authority: &Authority, router: Router) -> (u16, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let listener = TlsListener(listener, authority.acceptor());
    let mut server = JoinSet::new();
    server.spawn(async move { axum::serve(listener, router).await.unwrap() });
    (port, server)
}

#[tokio::test]
async fn a_custom_authority_is_trusted_where_it_is_configured_and_https_is_never_left() {
    let authority = Authority::new();
    let plain = Fake::start(|_| serve_image()).await;
    let (elsewhere, realm) = (plain.url("/content"), format!("Bearer realm=\"{}\"", plain.url("/token")));
    let router = Router::new().fallback(move |request: Request| async move {
        match request.uri().path() {
            "/v2/" => status(200),
            "/v2/team/app/manifests/1" => serve_image(),
            "/v2/team/app/manifests/2" => respond(307, &[("location", &elsewhere)], ""),
            _ => respond(401, &[("www-authenticate", &realm)], ""),
        }
    });
    let (port, _server) = serve(&authority, router).await;

    let settings = settings(&format!("https://127.0.0.1:{port}"));
    let error = Registry::new(settings.clone()).unwrap().ping().await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "an unknown authority: {error:?}");

    let registry = Registry::new(Settings { ca: Some(authority.read("ca.pem")), ..settings }).unwrap();
    registry.ping().await.unwrap();
    registry.manifest(&app(), &one()).await.unwrap().unwrap();
    let error = registry.manifest(&app(), &Address::Tag(tag("2"))).await.unwrap_err();
    assert!(matches!(error, Error::Elsewhere { .. }), "{error:?}");
    let error = registry.manifest(&app(), &Address::Tag(tag("3"))).await.unwrap_err();
    assert!(matches!(error, Error::Elsewhere { .. }), "{error:?}");
    assert!(plain.seen().is_empty(), "{:?}", plain.seen());
}

#[tokio::test]
async fn https_goes_through_the_proxy_of_the_environment_and_plain_http_does_not() {
    let authority = Authority::new();
    let (port, _server) = serve(&authority, Router::new().fallback(async || serve_image())).await;
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://user:pass@{}", proxy.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = asked.clone();
    let mut proxying = JoinSet::new();
    proxying.spawn(async move {
        let (mut client, _) = proxy.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(client.read_u8().await.unwrap());
        }
        log.lock().unwrap().push(String::from_utf8(head).unwrap());
        let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
    });
    let proxies = || Matcher::builder().all(address.clone()).build();

    let secure = settings(&format!("https://127.0.0.1:{port}"));
    let registry = Registry::through(Settings { ca: Some(authority.read("ca.pem")), ..secure }, proxies()).unwrap();
    registry.manifest(&app(), &one()).await.unwrap().unwrap();
    let plain = Fake::start(|_| serve_image()).await;
    Registry::through(plain.settings(), proxies()).unwrap().manifest(&app(), &one()).await.unwrap().unwrap();

    let asked = asked.lock().unwrap().clone();
    assert_eq!(asked.len(), 1);
    assert!(asked[0].starts_with(&format!("CONNECT 127.0.0.1:{port} HTTP/1.1\r\n")), "{asked:?}");
    assert!(asked[0].contains("dXNlcjpwYXNz"), "the proxy's own account: {asked:?}");
}
