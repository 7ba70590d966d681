//! Request bodies, bounded in size and time whoever reads them.

use std::{
    error::Error,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::Body;
use bytes::{Buf, Bytes};
use http::StatusCode;
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::Problem;

/// A body that fails when it grows beyond a size or is not complete by a time.
pub(super) struct Bounded<B> {
    inner: B,
    left: u64,
    deadline: Instant,
    /// Made when it is first waited for: most bodies arrive with their head.
    alarm: Option<Pin<Box<Sleep>>>,
}

impl<B> Bounded<B> {
    /// At most `size` bytes, within `time` from now.
    pub(super) fn new(inner: B, size: u64, time: Duration) -> Self {
        Self { inner, left: size, deadline: Instant::now() + time, alarm: None }
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    #[error("the request's body is larger than this server takes")]
    TooLarge,
    #[error("the request's body did not arrive in time")]
    TooSlow,
    #[error("the request's body broke off")]
    Broken(#[source] Box<dyn Error + Send + Sync>),
}

impl<B> hyper::body::Body for Bounded<B>
where
    B: hyper::body::Body + Unpin,
    B::Data: Buf,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    type Data = B::Data;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, BodyError>>> {
        let this = &mut *self;
        let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(cx) else {
            let alarm = this.alarm.get_or_insert_with(|| Box::pin(sleep_until(this.deadline)));
            ready!(alarm.as_mut().poll(cx));
            return Poll::Ready(Some(Err(BodyError::TooSlow)));
        };
        Poll::Ready(frame.map(|frame| {
            let frame = frame.map_err(|error| BodyError::Broken(error.into()))?;
            if let Some(data) = frame.data_ref() {
                this.left = this.left.checked_sub(data.remaining() as u64).ok_or(BodyError::TooLarge)?;
            }
            Ok(frame)
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Reads a whole request body. The server has bounded it; what goes wrong is answered with this problem: 413, 408 or 400.
pub async fn collect(body: Body) -> Result<Bytes, Problem> {
    let error = match body.collect().await {
        Ok(collected) => return Ok(collected.to_bytes()),
        Err(error) => error.into_inner(),
    };
    let status = match error.downcast_ref::<BodyError>() {
        Some(BodyError::TooLarge) => StatusCode::PAYLOAD_TOO_LARGE,
        Some(BodyError::TooSlow) => StatusCode::REQUEST_TIMEOUT,
        Some(BodyError::Broken(_)) | None => StatusCode::BAD_REQUEST,
    };
    Err(Problem::new(status, error.to_string()))
}
