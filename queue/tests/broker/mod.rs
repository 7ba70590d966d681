//! A RabbitMQ that the tests of one program share, each in a virtual host of its own.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use countersign_queue::amqp::{Access, Options};
use integration_tests::rabbitmq::RabbitMq;
use jiff::Timestamp;
use tokio::sync::Mutex;

pub struct Broker {
    pub rabbitmq: RabbitMq,
    vhosts: AtomicU32,
}

impl Broker {
    /// The one that runs, or a new one: it ends with the last test that has it.
    pub async fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Broker>> = Mutex::const_new(Weak::new());
        let mut shared = SHARED.lock().await;
        if let Some(broker) = shared.upgrade() {
            return broker;
        }
        let broker = Arc::new(Self { rabbitmq: RabbitMq::start().await.unwrap(), vhosts: AtomicU32::new(0) });
        *shared = Arc::downgrade(&broker);
        broker
    }

    pub async fn vhost(self: &Arc<Self>) -> Vhost {
        let name = format!("test{}", self.vhosts.fetch_add(1, Ordering::Relaxed));
        self.rabbitmq.manage("PUT", &format!("/api/vhosts/{name}"), None).await.unwrap();
        self.rabbitmq.manage("PUT", &format!("/api/permissions/{name}/guest"), Some(&all())).await.unwrap();
        Vhost { broker: Arc::clone(self), name }
    }
}

fn all() -> serde_json::Value {
    serde_json::json!({ "configure": ".*", "write": ".*", "read": ".*" })
}

/// Everything in it goes with it.
pub struct Vhost {
    pub broker: Arc<Broker>,
    pub name: String,
}

impl Vhost {
    pub fn url(&self) -> String {
        format!("{}/{}", self.broker.rabbitmq.url(), self.name)
    }

    pub fn options(&self, replica: &str) -> Options {
        let url = self.url();
        options(replica, move || vec![url.clone()])
    }
}

pub fn options(replica: &str, urls: impl Fn() -> Vec<String> + Send + Sync + 'static) -> Options {
    let access = move || Ok(Access { urls: urls().into_iter().map(Into::into).collect(), ..Access::default() });
    #[expect(clippy::disallowed_methods, reason = "the tests run in real time")]
    let options = Options::new(access, replica, Timestamp::now);
    Options { partitions: 3, ..options }
}

impl Drop for Vhost {
    fn drop(&mut self) {
        let (broker, name) = (Arc::clone(&self.broker), self.name.clone());
        // Not in the test's runtime, which may be ending.
        let delete = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let path = format!("/api/vhosts/{name}");
                let _ = tokio::time::timeout(Duration::from_secs(20), broker.rabbitmq.manage("DELETE", &path, None)).await;
            });
        });
        let _ = delete.join();
    }
}
