//! Every backend keeps what the crate and its trait promise: one suite, run on each.

mod broker;
mod contract {
    pub mod suite;
}

use std::{path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use broker::{Broker, Vhost};
use contract::suite::{self, Backend};
use countersign_queue::{Amqp, Embedded, Options, Queue};
use integration_tests::process::eventually;
use jiff::Timestamp;
use tempfile::TempDir;
use tokio_util::task::TaskTracker;

struct EmbeddedBackend {
    folder: TempDir,
    history: Duration,
    queue: Option<Arc<dyn Queue>>,
}

#[async_trait]
impl Backend for EmbeddedBackend {
    async fn fresh() -> Self {
        Self::keeping(Duration::from_secs(3600)).await
    }

    async fn keeping(history: Duration) -> Self {
        let folder = TempDir::new().unwrap();
        let queue = Some(open(folder.path(), history));
        Self { folder, history, queue }
    }

    fn queue(&self) -> Arc<dyn Queue> {
        Arc::clone(self.queue.as_ref().unwrap())
    }

    async fn restart(&mut self) -> Arc<dyn Queue> {
        self.queue = None;
        self.queue = Some(open(self.folder.path(), self.history));
        self.queue()
    }
}

fn open(folder: &Path, history: Duration) -> Arc<dyn Queue> {
    #[expect(clippy::disallowed_methods, reason = "the suite runs in real time")]
    let options = Options { history, ..Options::new(Timestamp::now) };
    Arc::new(Embedded::open(folder, options).unwrap())
}

suite::hold_to_the_contract!(embedded, EmbeddedBackend);

/// On a real RabbitMQ, in a virtual host of its own.
struct AmqpBackend {
    queue: Option<Arc<dyn Queue>>,
    history: Duration,
    tracker: TaskTracker,
    vhost: Vhost,
}

impl AmqpBackend {
    async fn open(&mut self) {
        self.tracker = TaskTracker::new();
        let options = countersign_queue::amqp::Options { history: self.history, ..self.vhost.options("replica") };
        let queue = Amqp::open(options, &self.tracker).await.unwrap();
        // A broker that is busy may not have let it in at the first try.
        eventually("it is connected", Duration::from_secs(60), async || Ok(queue.probe().await.ok())).await.unwrap();
        self.queue = Some(Arc::new(queue));
    }
}

#[async_trait]
impl Backend for AmqpBackend {
    async fn fresh() -> Self {
        Self::keeping(Duration::from_secs(3600)).await
    }

    async fn keeping(history: Duration) -> Self {
        let vhost = Broker::shared().await.vhost().await;
        let mut backend = Self { queue: None, history, tracker: TaskTracker::new(), vhost };
        backend.open().await;
        backend
    }

    fn queue(&self) -> Arc<dyn Queue> {
        Arc::clone(self.queue.as_ref().unwrap())
    }

    async fn restart(&mut self) -> Arc<dyn Queue> {
        self.queue = None;
        self.tracker.close();
        self.tracker.wait().await;
        self.open().await;
        self.queue()
    }
}

suite::hold_to_the_contract!(amqp, AmqpBackend);
