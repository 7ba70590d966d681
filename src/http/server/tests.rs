use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    sync::atomic::AtomicUsize,
};

use axum::{
    extract::{Request as AxumRequest, State},
    routing::{get, post},
};
use http::header::ALLOW;
use secrecy::SecretString;
use tokio::{
    net::{TcpStream, UnixStream},
    sync::Notify,
    task::JoinHandle,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, ServerName, pem::PemObject},
    },
};

use super::*;
use crate::http::collect;

/// So long that only what is tested can end it.
const LONG: Duration = Duration::from_secs(3600);
const SHORT: Duration = Duration::from_millis(300);

struct Running {
    address: SocketAddr,
    drain: CancellationToken,
    abort: CancellationToken,
    counters: Arc<Counters>,
    serving: JoinHandle<()>,
}

fn patient() -> Limits {
    Limits { max_body: 1000, header_timeout: LONG, body_timeout: LONG, max_requests: 100, max_connections: 100 }
}

/// What handlers wait for, and tell of.
#[derive(Default)]
struct Gate {
    entered: Notify,
    open: Notify,
}

fn router(gate: &Arc<Gate>) -> Router {
    Router::new()
        .route("/livez", get(async || "alive"))
        .route("/ok", get(async || "ok"))
        .route(
            "/length",
            post(async |request: AxumRequest| collect(request.into_body()).await.map(|body| body.len().to_string())),
        )
        .route("/panic", get(async || panic!("on purpose") as String))
        .route("/text", get(async || (StatusCode::IM_A_TEAPOT, "short and stout")))
        .route("/large", get(async || "x".repeat(64 << 20)))
        .route(
            "/wait",
            get(async |State(gate): State<Arc<Gate>>| {
                gate.entered.notify_one();
                gate.open.notified().await;
                "waited"
            }),
        )
        .with_state(Arc::clone(gate))
}

async fn start(limits: Limits, tls: Option<Tls>) -> (Running, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let server = Server::bind("127.0.0.1:0".parse().unwrap(), limits, tls).await.unwrap();
    let (drain, abort) = (CancellationToken::new(), CancellationToken::new());
    let address = server.local_addr().unwrap();
    let counters = server.counters();
    let serving = TaskTracker::new().spawn(server.serve(router(&gate), drain.clone(), abort.clone()));
    (Running { address, drain, abort, counters, serving }, gate)
}

impl Running {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends `text` on a connection of its own, and reads to the end.
    async fn exchange(&self, text: &str) -> String {
        let mut stream = self.connect().await;
        stream.write_all(text.as_bytes()).await.unwrap();
        to_end(&mut stream).await
    }

    async fn get(&self, path: &str) -> String {
        self.exchange(&format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await
    }

    async fn stop(self) {
        self.drain.cancel();
        self.serving.await.unwrap();
    }
}

async fn to_end(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8(answer).unwrap()
}

/// Reads one answer that ends in `end`, and leaves the connection open.
async fn until(stream: &mut (impl AsyncRead + Unpin), end: &str) -> String {
    let mut answer = Vec::new();
    while !answer.ends_with(end.as_bytes()) {
        answer.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(answer).unwrap()
}

fn assert_problem(answer: &str, status: u16) {
    assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    assert!(answer.contains("content-type: application/problem+json\r\n"), "{answer}");
    assert!(answer.contains(&format!(r#""status":{status}"#)), "{answer}");
}

#[tokio::test]
async fn a_connection_is_kept_for_more_requests() {
    let (server, _gate) = start(patient(), None).await;
    let mut stream = server.connect().await;
    for _ in 0..3 {
        stream.write_all(b"POST /length HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello").await.unwrap();
        assert!(until(&mut stream, "\r\n\r\n5").await.starts_with("HTTP/1.1 200 OK\r\n"));
    }
    drop(stream);
    server.stop().await;
}

#[tokio::test]
async fn every_error_is_a_problem_document() {
    let (server, _gate) = start(patient(), None).await;
    assert_problem(&server.get("/nowhere").await, 404);
    let answer = server.exchange("DELETE /length HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert_problem(&answer, 405);
    assert!(answer.to_lowercase().contains(&format!("{ALLOW}: post\r\n")), "{answer}");
    let answer = server.get("/text").await;
    assert_problem(&answer, 418);
    assert!(answer.contains("short and stout"));
    assert_problem(&server.get("/panic").await, 500);
    assert!(server.get("/ok").await.ends_with("\r\n\r\nok"), "goes on after a panic");
    assert_eq!(server.counters.refused()[2], ("panicked", 1));
}

#[tokio::test]
async fn a_body_that_says_it_is_too_large_is_refused_before_it_is_sent() {
    let (server, _gate) = start(patient(), None).await;
    let answer = server.exchange("POST /length HTTP/1.1\r\nhost: x\r\ncontent-length: 1001\r\n\r\n").await;
    assert_problem(&answer, 413);
    assert!(answer.contains("connection: close\r\n"));
    assert_eq!(server.counters.refused()[1], ("too_large", 1));
}

#[tokio::test]
async fn a_chunked_body_is_refused_when_it_grows_too_large_and_the_client_sees_why() {
    let (server, _gate) = start(patient(), None).await;
    let chunk = format!("{:x}\r\n{}\r\n", 500, "x".repeat(500));
    let head = "POST /length HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    assert!(server.exchange(&format!("{head}{}0\r\n\r\nGET / HTTP/1.0\r\n\r\n", chunk.repeat(2))).await.contains("\r\n\r\n1000"));
    // Much more than fits the socket's buffers: without lingering, the reset would overtake the answer.
    assert_problem(&server.exchange(&format!("{head}{}0\r\n\r\n", chunk.repeat(20_000))).await, 413);
}

#[tokio::test]
async fn a_slow_head_costs_the_connection() {
    let (server, _gate) = start(Limits { header_timeout: SHORT, ..patient() }, None).await;
    assert_eq!(server.exchange("").await, "", "nothing was asked");
    assert_eq!(server.exchange("GET /ok HTTP/1.1\r\nhost: x\r\nx-slow:").await, "", "a head that does not end");
    let answer = server.exchange("GET /ok HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(answer.ends_with("\r\n\r\nok"), "an idle connection is closed after its answer: {answer}");
}

#[tokio::test]
async fn a_slow_body_is_a_408() {
    let (server, _gate) = start(Limits { body_timeout: SHORT, ..patient() }, None).await;
    assert_problem(&server.exchange("POST /length HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhell").await, 408);
}

#[tokio::test]
async fn a_body_that_breaks_off_is_a_400() {
    let (server, _gate) = start(patient(), None).await;
    let mut stream = server.connect().await;
    stream.write_all(b"POST /length HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n").await.unwrap();
    assert_problem(&to_end(&mut stream).await, 400);
}

#[tokio::test]
async fn a_head_that_is_too_large_is_a_431() {
    let (server, _gate) = start(patient(), None).await;
    let answer = server.exchange(&format!("GET /ok HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(MAX_HEAD))).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    let answer = server.exchange(&format!("GET /ok HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(200))).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
}

#[tokio::test]
async fn what_is_not_http_is_refused() {
    let (server, _gate) = start(patient(), None).await;
    for text in
        ["\x16\x03\x01 TLS?\r\n\r\n", "hello\r\n\r\n", "GET /ok HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n"]
    {
        let answer = server.exchange(text).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{text:?}: {answer}");
    }
}

#[tokio::test]
async fn more_requests_than_may_be_in_hand_are_sent_away_and_probes_are_not() {
    let (server, gate) = start(Limits { max_requests: 1, ..patient() }, None).await;
    let waiting = server.get("/wait");
    tokio::pin!(waiting);
    tokio::select! {
        answer = &mut waiting => panic!("{answer}"),
        () = gate.entered.notified() => {}
    }
    let answer = server.get("/ok").await;
    assert_problem(&answer, 503);
    assert!(answer.contains("retry-after: 1\r\n"));
    assert!(server.get("/livez").await.starts_with("HTTP/1.1 200 OK\r\n"));
    assert_eq!(server.counters.refused()[0], ("busy", 1));
    gate.open.notify_one();
    assert!(waiting.await.ends_with("\r\n\r\nwaited"));
    assert!(server.get("/ok").await.starts_with("HTTP/1.1 200 OK\r\n"));
}

#[tokio::test]
async fn more_connections_than_are_allowed_wait_for_one_to_close() {
    let (server, _gate) = start(Limits { max_connections: 1, ..patient() }, None).await;
    let mut first = server.connect().await;
    first.write_all(b"GET /ok HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    until(&mut first, "\r\n\r\nok").await;
    let closed = AtomicUsize::new(0);
    let second = async {
        let answer = server.get("/ok").await;
        assert_eq!(closed.load(Relaxed), 1, "answered while the first connection was open");
        answer
    };
    let (answer, ()) = futures::join!(second, async {
        // Still served: the second has not taken its place.
        first.write_all(b"GET /ok HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        until(&mut first, "\r\n\r\nok").await;
        closed.store(1, Relaxed);
        drop(first);
    });
    assert!(answer.ends_with("\r\n\r\nok"));
}

#[tokio::test]
async fn a_client_that_does_not_take_its_answer_loses_its_connection() {
    let (server, _gate) = start(Limits { body_timeout: SHORT, max_connections: 1, ..patient() }, None).await;
    let mut deaf = server.connect().await;
    deaf.write_all(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(server.get("/ok").await.ends_with("\r\n\r\nok"), "the place is free again");
}

#[tokio::test]
async fn draining_answers_what_is_in_hand_closes_what_is_idle_and_listens_no_more() {
    let (server, gate) = start(patient(), None).await;
    let mut idle = server.connect().await;
    idle.write_all(b"GET /ok HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    until(&mut idle, "\r\n\r\nok").await;
    let mut fresh = server.connect().await;
    let mut busy = server.connect().await;
    busy.write_all(b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    gate.entered.notified().await;

    server.drain.cancel();
    assert_eq!(to_end(&mut idle).await, "");
    assert_eq!(to_end(&mut fresh).await, "");
    while TcpStream::connect(server.address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert!(!server.serving.is_finished());
    gate.open.notify_one();
    let answer = to_end(&mut busy).await;
    assert!(answer.contains("connection: close\r\n") && answer.ends_with("\r\n\r\nwaited"), "{answer}");
    drop((idle, fresh, busy));
    server.serving.await.unwrap();
}

#[tokio::test]
async fn aborting_ends_requests_that_do_not_end() {
    let (server, gate) = start(patient(), None).await;
    let mut stuck = server.connect().await;
    stuck.write_all(b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    gate.entered.notified().await;
    server.drain.cancel();
    server.abort.cancel();
    server.serving.await.unwrap();
    assert_eq!(to_end(&mut stuck).await, "");
}

#[tokio::test]
async fn tls_is_spoken_with_the_certificate_that_was_set_last() {
    let certificate = |name: &str| match name {
        "first" => (&include_bytes!("testdata/first.cert.pem")[..], include_str!("testdata/first.key.pem")),
        _ => (&include_bytes!("testdata/renewed.cert.pem")[..], include_str!("testdata/renewed.key.pem")),
    };
    let tls = |name| {
        let (chain, key) = certificate(name);
        Tls::from_pem(chain, &SecretString::from(key)).unwrap()
    };
    let presented = tls("first");
    let (server, _gate) = start(patient(), Some(presented.clone())).await;
    let ask = async |trusted: &str| -> io::Result<String> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(certificate(trusted).0).unwrap()).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let name = ServerName::try_from("localhost").unwrap();
        let mut stream = TlsConnector::from(Arc::new(config)).connect(name, server.connect().await).await?;
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        stream.write_all(b"GET /ok HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
        Ok(to_end(&mut stream).await)
    };
    assert!(ask("first").await.unwrap().ends_with("\r\n\r\nok"));
    presented.replace(&tls("renewed"));
    assert!(ask("first").await.is_err());
    assert!(ask("renewed").await.unwrap().ends_with("\r\n\r\nok"));

    let (first, renewed) = (certificate("first"), certificate("renewed"));
    for (chain, key) in [(&b""[..], first.1), (&b"x"[..], first.1), (first.0, ""), (first.0, renewed.1)] {
        let error = Tls::from_pem(chain, &SecretString::from(key)).unwrap_err().to_string();
        assert!(error.starts_with("the TLS ") && !error.contains("BEGIN"), "{error}");
    }
}

#[tokio::test]
async fn a_client_that_never_shakes_hands_is_let_go() {
    let tls = Tls::from_pem(include_bytes!("testdata/first.cert.pem"), &include_str!("testdata/first.key.pem").into()).unwrap();
    let (server, _gate) = start(Limits { header_timeout: SHORT, ..patient() }, Some(tls)).await;
    assert_eq!(server.exchange("").await, "");
}

#[tokio::test]
async fn the_local_socket_is_for_its_user_alone_and_goes_with_its_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let bind = async || Server::bind_unix(&path, patient()).await;

    fs::write(&path, "mine").unwrap();
    assert!(matches!(bind().await, Err(Error::NotASocket(_))));
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    fs::remove_file(&path).unwrap();

    // Left behind by a process that was killed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let stale = fs::metadata(&path).unwrap().ino();
    let server = bind().await.unwrap();
    let made = fs::metadata(&path).unwrap();
    assert!(made.ino() != stale && made.permissions().mode() & 0o777 == 0o600);
    assert!(server.local_addr().is_none());
    assert!(matches!(bind().await, Err(Error::InUse(_))));

    let drain = CancellationToken::new();
    let router = router(&Arc::default());
    let serving = TaskTracker::new().spawn(server.serve(router, drain.clone(), CancellationToken::new()));
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream.write_all(b"GET /ok HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    assert!(to_end(&mut stream).await.ends_with("\r\n\r\nok"));
    drop(stream);
    drain.cancel();
    serving.await.unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

    let long = folder.path().join("x".repeat(200));
    assert!(matches!(Server::bind_unix(&long, patient()).await, Err(Error::Socket { .. })));
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let error = Server::bind(address, patient(), None).await.unwrap_err();
    assert_eq!(error.to_string(), format!("cannot listen on {address}"));
}
