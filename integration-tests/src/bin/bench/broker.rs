//! lapin with nothing around it: what a broker does for a client that only publishes, or only consumes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::StreamExt as _;
use integration_tests::rabbitmq::RabbitMq;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueBindOptions, QueueDeclareOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::bare::Writes;
use crate::wire::{Wire, Work as _};

/// As many as the daemon has by default.
const PARTITIONS: usize = 8;
/// As the daemon's.
const WINDOW: u16 = 128;
/// Where the daemon pushes to, with its partitions' routing keys.
pub const ACCEPT: &str = "countersign.v1.accept";

/// A message as the daemon publishes it.
#[derive(Clone)]
pub struct Template {
    body: Vec<u8>,
    properties: BasicProperties,
}

/// A connection, and one quorum queue a partition, as the daemon's are.
pub struct Bare {
    connection: Connection,
    channel: Channel,
}

fn queue(partition: usize) -> String {
    format!("bare.{partition}")
}

impl Bare {
    pub async fn connect(broker: &RabbitMq) -> Result<Self> {
        let connection = Connection::connect(&broker.url(), ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        for partition in 0..PARTITIONS {
            declare(&channel, &queue(partition)).await?;
        }
        Ok(Self { connection, channel })
    }

    /// The message that a push of the daemon's becomes.
    pub async fn tap(&self, push: impl Future<Output = Result<()>>) -> Result<Template> {
        declare(&self.channel, "tap").await?;
        for partition in 0..PARTITIONS {
            let route = format!("{PARTITIONS}.{partition}");
            let bound = self.channel.queue_bind(
                "tap".into(),
                ACCEPT.into(),
                route.as_str().into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            );
            bound.await?;
        }
        push.await?;
        let got = self.channel.basic_get("tap".into(), BasicGetOptions { no_ack: true }).await?.context("nothing was pushed")?;
        self.channel.queue_delete("tap".into(), lapin::options::QueueDeleteOptions::default()).await?;
        Ok(Template { body: got.delivery.data, properties: got.delivery.properties })
    }

    /// Publishes for so long, `in_flight` unconfirmed at once, and says how many a second were confirmed. To its own queues, or
    /// where the daemon publishes to.
    pub async fn publish(&self, template: &Template, in_flight: usize, span: Duration, to_ours: bool) -> Result<f64> {
        let (begun, next) = (Instant::now(), Arc::new(AtomicUsize::new(0)));
        let mut tasks = JoinSet::new();
        for _ in 0..in_flight {
            let (channel, next, template) = (self.channel.clone(), Arc::clone(&next), template.clone());
            tasks.spawn(async move {
                while begun.elapsed() < span {
                    let partition = next.fetch_add(1, Ordering::Relaxed) % PARTITIONS;
                    let Template { body, properties } = &template;
                    let (exchange, route) =
                        if to_ours { (ACCEPT, format!("{PARTITIONS}.{partition}")) } else { ("", queue(partition)) };
                    confirmed(&channel, exchange, &route, body, properties.clone()).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        #[expect(clippy::cast_precision_loss, reason = "counts of a benchmark are far below 2^52")]
        let published = next.load(Ordering::Relaxed) as f64;
        Ok(published / begun.elapsed().as_secs_f64())
    }

    /// Publishes as many messages as there are `writes`, and consumes them with acks: for each the requests of one signature are
    /// made, `in_flight` at once. From the first published to the last acked.
    pub async fn work_off(
        &self,
        host: &str,
        template: &Template,
        in_flight: usize,
        writes: &Arc<Writes>,
        count: usize,
    ) -> Result<Duration> {
        let consuming = self.connection.create_channel().await?;
        consuming.basic_qos(WINDOW, BasicQosOptions::default()).await?;
        let (sender, receiver) = mpsc::channel(in_flight);
        let receiver = Arc::new(tokio::sync::Mutex::new(receiver));
        let mut feeding = JoinSet::new();
        for partition in 0..PARTITIONS {
            let name = queue(partition);
            let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
            let mut consumer = consuming.basic_consume(name.as_str().into(), name.as_str().into(), options, none).await?;
            let sender = sender.clone();
            feeding.spawn(async move {
                while let Some(Ok(delivery)) = consumer.next().await {
                    if sender.send(delivery).await.is_err() {
                        break;
                    }
                }
            });
        }
        let (begun, left) = (Instant::now(), Arc::new(AtomicUsize::new(count)));
        let mut working = JoinSet::new();
        for _ in 0..in_flight {
            let mut wire = Wire::open(host).await?;
            let (receiver, writes, left) = (Arc::clone(&receiver), Arc::clone(writes), Arc::clone(&left));
            working.spawn(async move {
                while left.load(Ordering::Relaxed) > 0 {
                    let next = tokio::time::timeout(Duration::from_millis(50), async { receiver.lock().await.recv().await });
                    let Ok(Some(delivery)) = next.await else { continue };
                    let number = delivery.properties.message_id().as_ref().context("a message without a number")?;
                    writes.one(number.as_str().parse()?, &mut wire).await?;
                    delivery.acker.ack(BasicAckOptions::default()).await?;
                    left.fetch_sub(1, Ordering::Relaxed);
                }
                anyhow::Ok(())
            });
        }
        let publishing = (0..count).map(|number| async move {
            let properties = template.properties.clone().with_message_id(number.to_string().into());
            confirmed(&self.channel, "", &queue(number % PARTITIONS), &template.body, properties).await
        });
        let mut publishing = futures::stream::iter(publishing).buffer_unordered(in_flight);
        while let Some(published) = publishing.next().await {
            published?;
        }
        while let Some(ended) = working.join_next().await {
            ended??;
        }
        let took = begun.elapsed();
        consuming.close(200, "OK".into()).await?;
        feeding.abort_all();
        Ok(took)
    }

    /// Empties its own queues.
    pub async fn purge(&self) -> Result<()> {
        for partition in 0..PARTITIONS {
            self.channel.queue_purge(queue(partition).as_str().into(), QueuePurgeOptions::default()).await?;
        }
        Ok(())
    }
}

async fn declare(channel: &Channel, name: &str) -> Result<()> {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(name.into(), options, arguments).await?;
    Ok(())
}

async fn confirmed(channel: &Channel, exchange: &str, route: &str, body: &[u8], properties: BasicProperties) -> Result<()> {
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    let confirmation = channel.basic_publish(exchange.into(), route.into(), options, body, properties).await?.await?;
    ensure!(matches!(confirmation, Confirmation::Ack(None)), "{confirmation:?}");
    Ok(())
}
