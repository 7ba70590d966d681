//! A broker that speaks TLS alone, and lets nobody in without a client certificate.

#[expect(dead_code, reason = "of what the other tests share, only the options are needed")]
mod broker;

use std::{fs, path::Path, process::Command, time::Duration};

use broker::options;
use bytes::Bytes;
use countersign_queue::{
    Amqp, Error, Message, PartitionKey, Queue,
    amqp::{Access, Options},
};
use integration_tests::rabbitmq::RabbitMq;
use tempfile::TempDir;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

const LIMIT: Duration = Duration::from_secs(60);

/// Certificates, made by the openssl that RabbitMQ comes with.
struct Certificates(TempDir);

impl Certificates {
    /// Two authorities: `ca`, of the broker and of `client` and `expired`; and `other`, of `stranger`.
    fn make() -> Self {
        let made = Self(TempDir::new().unwrap());
        made.authority("ca");
        made.authority("other");
        made.signed("server", "ca", "30");
        made.signed("client", "ca", "30");
        made.signed("expired", "ca", "-1");
        made.signed("stranger", "other", "30");
        made
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl").args(arguments.split(' ')).current_dir(self.0.path()).output().unwrap();
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn authority(&self, name: &str) {
        self.openssl(&format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN={name} -keyout {name}.key -out {name}.pem"
        ));
    }

    fn signed(&self, name: &str, by: &str, days: &str) {
        fs::write(self.0.path().join("ext"), "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n").unwrap();
        self.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"
        ));
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA {by}.pem -CAkey {by}.key -CAcreateserial -days {days} -extfile ext -out {name}.pem"
        ));
    }

    fn folder(&self) -> &Path {
        self.0.path()
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.folder().join(name)).unwrap()
    }

    /// Who believes `ca`, and shows itself as `identity`.
    fn options(&self, url: &str, ca: &str, identity: Option<&str>) -> Options {
        let access = Access {
            urls: vec![url.into()],
            ca: Some(self.read(&format!("{ca}.pem")).into()),
            identity: identity.map(|name| (self.read(&format!("{name}.pem")).into(), self.read(&format!("{name}.key")).into())),
        };
        Options { access: std::sync::Arc::new(move || Ok(access.clone())), ..options("replica", Vec::new) }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_certificate_lets_in_and_what_is_wrong_with_one_is_told_with_the_cure() {
    let certificates = Certificates::make();
    let folder = certificates.folder().display();
    let broker = RabbitMq::start_with(&format!(
        "listeners.ssl.1 = 127.0.0.1:{{tls}}\n\
         ssl_options.cacertfile = {folder}/ca.pem\n\
         ssl_options.certfile = {folder}/server.pem\n\
         ssl_options.keyfile = {folder}/server.key\n\
         ssl_options.verify = verify_peer\n\
         ssl_options.fail_if_no_peer_cert = true\n\
         auth_mechanisms.1 = PLAIN\n\
         auth_mechanisms.2 = EXTERNAL\n\
         ssl_cert_login_from = common_name\n"
    ))
    .await
    .unwrap();
    let url = format!("amqps://guest:guest@127.0.0.1:{}", broker.tls_port());
    let tracker = TaskTracker::new();

    let queue = Amqp::open(certificates.options(&url, "ca", Some("client")), &tracker).await.unwrap();
    let message = |id: &str| Message {
        id: id.to_owned(),
        content_type: "text/plain".to_owned(),
        key: PartitionKey(id.to_owned()),
        body: Bytes::from("body"),
        replay_of: None,
    };
    queue.push(vec![message("1")]).await.unwrap();
    let delivery = timeout(LIMIT, queue.pull()).await.unwrap().unwrap().unwrap();
    assert_eq!(delivery.message(), &message("1"));
    delivery.ack().await.unwrap();
    drop(queue);

    // By the certificate alone, without a password.
    let user = serde_json::json!({ "password_hash": "", "tags": "" });
    broker.manage("PUT", "/api/users/client", Some(&user)).await.unwrap();
    let all = serde_json::json!({ "configure": ".*", "write": ".*", "read": ".*" });
    broker.manage("PUT", "/api/permissions/%2F/client", Some(&all)).await.unwrap();
    let external = format!("amqps://127.0.0.1:{}/%2f?auth_mechanism=external", broker.tls_port());
    let queue = Amqp::open(certificates.options(&external, "ca", Some("client")), &tracker).await.unwrap();
    queue.push(vec![message("2")]).await.unwrap();
    drop(queue);

    // What the broker says of our certificate may be lost with the connection: then it is one of several things.
    for (ca, identity, expected) in [
        ("other", Some("client"), ["its certificate is of nobody that we believe; `ca` in `tls`"; 2]),
        (
            "ca",
            None,
            ["it wants a client certificate; name it as `certificate` and `key`", "may want a client certificate; name it"],
        ),
        (
            "ca",
            Some("expired"),
            ["our client certificate has expired; renew `certificate`", "`certificate` in `tls` may have expired"],
        ),
        ("ca", Some("stranger"), ["who signed `certificate` in `tls`", "or it has to know who signed it"]),
    ] {
        let queue = Amqp::open(certificates.options(&url, ca, identity), &tracker).await.unwrap();
        match queue.push(vec![message("3")]).await {
            Err(Error::Unavailable { what, .. }) => {
                assert!(expected.iter().any(|expected| what.contains(expected)), "{ca} {identity:?}: {what}");
                assert!(what.contains("127.0.0.1") && !what.contains("guest"), "{what}");
            }
            other => panic!("{ca} {identity:?}: {other:?}"),
        }
    }
}
