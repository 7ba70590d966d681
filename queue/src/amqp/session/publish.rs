//! Publishing, and what the broker says of it.

use std::collections::HashSet;

use futures::future::try_join_all;
use lapin::{BasicProperties, Confirmation};

use super::Session;
use crate::{Error, amqp::flags};

/// The broker's word on a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::amqp) enum Word {
    Kept,
    /// It, or another that was under way with it, was taken by no queue.
    SentBack,
    Refused,
}

impl Session {
    /// Has a message kept: returns once the broker has confirmed it.
    pub async fn publish(&self, exchange: &str, route: &str, properties: BasicProperties, body: &[u8]) -> Result<(), Error> {
        self.kept(exchange, route, self.send(exchange, route, properties, body)).await
    }

    /// As [`Session::publish`], of what is being sent.
    pub async fn kept(
        &self,
        exchange: &str,
        route: &str,
        sending: impl Future<Output = lapin::Result<Word>>,
    ) -> Result<(), Error> {
        match self.confirmed(sending).await? {
            Word::Kept => Ok(()),
            Word::SentBack => {
                let what = format!("no queue takes messages of {exchange} for \"{route}\", or of others that are published now");
                let error = Error::Unavailable { what, source: None };
                // Someone has deleted it. The next session declares it again.
                self.fail(&error);
                Err(error)
            }
            Word::Refused => {
                let what = format!("the broker refused a message of {exchange} for \"{route}\": is a length limit reached?");
                Err(Error::Unavailable { what, source: None })
            }
        }
    }

    /// Those of these routing keys for which a queue takes what is published. Found out by publishing messages of no meaning.
    pub async fn leading_somewhere(&self, exchange: &str, routes: Vec<String>) -> Result<HashSet<String>, Error> {
        let probing = async {
            let mut sending = Vec::with_capacity(routes.len());
            for route in &routes {
                let properties = BasicProperties::default().with_delivery_mode(2);
                let probe =
                    self.probing.basic_publish(exchange.into(), route.as_str().into(), flags::PUBLISH, b"probe", properties);
                sending.push(probe.await?);
            }
            // What comes back may come with the word on another, but with one of these.
            let mut leading: HashSet<String> = routes.iter().cloned().collect();
            for confirmation in try_join_all(sending).await? {
                match confirmation {
                    Confirmation::Ack(Some(returned)) | Confirmation::Nack(Some(returned)) => {
                        leading.remove(returned.routing_key.as_str());
                    }
                    Confirmation::Ack(None) | Confirmation::Nack(None) | Confirmation::NotRequested => {}
                }
            }
            Ok(leading)
        };
        self.confirmed(probing).await
    }

    /// Publishes, and waits for the broker's word as long as it takes.
    pub async fn send(&self, exchange: &str, route: &str, properties: BasicProperties, body: &[u8]) -> lapin::Result<Word> {
        let sent = self.publish.basic_publish(exchange.into(), route.into(), flags::PUBLISH, body, properties).await?;
        let confirmation = sent.await?;
        Ok(match confirmation {
            // Whose it is cannot be told.
            _ if self.returns.any_on(self.publish.id()) => Word::SentBack,
            Confirmation::Ack(_) => Word::Kept,
            Confirmation::Nack(_) | Confirmation::NotRequested => Word::Refused,
        })
    }

    async fn confirmed<T>(&self, sending: impl Future<Output = lapin::Result<T>>) -> Result<T, Error> {
        let mut blocked = self.blocked.subscribe();
        tokio::select! {
            biased;
            Ok(reason) = blocked.wait_for(Option::is_some) => Err(takes_none(reason.as_deref())),
            confirmation = self.asked(sending) => confirmation,
        }
    }

    /// An error while the broker takes no messages.
    pub fn takes(&self) -> Result<(), Error> {
        self.blocked().map_or(Ok(()), |reason| Err(takes_none(Some(&reason))))
    }

    /// Sends what may be lost.
    pub async fn tell(&self, exchange: &str, from: &str, body: &[u8]) -> Result<(), Error> {
        if self.blocked().is_some() {
            return Ok(());
        }
        let properties = BasicProperties::default().with_app_id(from.into());
        self.asked(async {
            self.publish.basic_publish(exchange.into(), "".into(), flags::TELL, body, properties).await?.await.map(drop)
        })
        .await
    }
}

fn takes_none(reason: Option<&str>) -> Error {
    let what = format!("the broker takes no messages: {}", reason.unwrap_or_default());
    Error::Unavailable { what, source: None }
}
