//! The doors as HTTP.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, Request, State, rejection::PathRejection},
    response::{IntoResponse, Response},
    routing::post,
};
use http::{
    HeaderValue, StatusCode,
    header::{RETRY_AFTER, WWW_AUTHENTICATE},
};
use serde_json::json;

use super::{Answer, Incoming, Intake, counters::Refused};
use crate::http::{Problem, collect};

/// One text for every refusal, so that it tells nothing of the source.
const CHALLENGE: HeaderValue = HeaderValue::from_static(r#"Bearer realm="events", Basic realm="events", charset="UTF-8""#);

/// `POST /events/{source}`. Bounding the body's size and time is the server's work.
pub fn router(intake: Arc<Intake>) -> Router {
    Router::new().route("/events/{source}", post(receive)).with_state(intake)
}

async fn receive(
    State(intake): State<Arc<Intake>>,
    source: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Answer, Problem> {
    let (head, body) = request.into_parts();
    // A path that is not UTF-8 names no source. Who has no secret does not make us hold a body.
    let source = source.as_ref().map_or("", |Path(source)| source.as_str());
    let Some(door) = intake.authenticate(source, &head.headers) else { return Ok(Answer::Unauthorized) };
    let body = collect(body).await.inspect_err(|_| door.counters.refused(Refused::Body))?;
    Ok(intake.accept(&door, &Incoming::by_http(&head.headers, body)).await)
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        match self {
            Self::Accepted { taken, ignored, quarantined } => {
                let counts = json!({ "taken": taken, "ignored": ignored, "quarantined": quarantined });
                (StatusCode::ACCEPTED, Json(counts)).into_response()
            }
            Self::Unauthorized => {
                let problem = Problem::new(StatusCode::UNAUTHORIZED, "the source's secret is missing or wrong");
                ([(WWW_AUTHENTICATE, CHALLENGE)], problem).into_response()
            }
            Self::Unavailable => {
                let problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, "the event could not be stored; send it again");
                ([(RETRY_AFTER, HeaderValue::from_static("1"))], problem).into_response()
            }
        }
    }
}
