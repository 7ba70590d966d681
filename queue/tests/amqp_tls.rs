//! A broker that speaks TLS alone, and lets nobody in without a client certificate.

#[expect(dead_code, reason = "of what the other tests share, only the options are needed")]
mod broker;

use std::time::Duration;

use broker::options;
use bytes::Bytes;
use countersign_queue::{
    Amqp, Error, Message, PartitionKey, Queue,
    amqp::{Access, Options},
};
use integration_tests::{certificates::Certificates, rabbitmq::RabbitMq};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

const LIMIT: Duration = Duration::from_secs(60);

/// Who believes `ca`, and shows itself as `identity`.
fn showing(certificates: &Certificates, url: &str, ca: &str, identity: Option<&str>) -> Options {
    let read = |name: &str, kind: &str| certificates.read(&format!("{name}.{kind}")).unwrap();
    let access = Access {
        urls: vec![url.into()],
        ca: Some(read(ca, "pem").into()),
        identity: identity.map(|name| (read(name, "pem").into(), read(name, "key").into())),
    };
    Options { access: std::sync::Arc::new(move || Ok(access.clone())), ..options("replica", Vec::new) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_certificate_lets_in_and_what_is_wrong_with_one_is_told_with_the_cure() {
    let certificates = Certificates::make().unwrap();
    let broker = RabbitMq::start_with(&certificates.demanded_by_rabbitmq()).await.unwrap();
    let url = format!("amqps://guest:guest@127.0.0.1:{}", broker.tls_port());
    let tracker = TaskTracker::new();

    let queue = Amqp::open(showing(&certificates, &url, "ca", Some("client")), &tracker).await.unwrap();
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
    let queue = Amqp::open(showing(&certificates, &external, "ca", Some("client")), &tracker).await.unwrap();
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
        let queue = Amqp::open(showing(&certificates, &url, ca, identity), &tracker).await.unwrap();
        match queue.push(vec![message("3")]).await {
            Err(Error::Unavailable { what, .. }) => {
                assert!(expected.iter().any(|expected| what.contains(expected)), "{ca} {identity:?}: {what}");
                assert!(what.contains("127.0.0.1") && !what.contains("guest"), "{what}");
            }
            other => panic!("{ca} {identity:?}: {other:?}"),
        }
    }
}
