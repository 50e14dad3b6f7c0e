//! `/metrics`, `/live` and `/ready`.

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;

use crate::health::Health;
use crate::metrics::Metrics;

#[derive(Clone)]
struct Shared {
    metrics: Metrics,
    health: Health,
}

/// The routes; `/live` fails while a loop counts as stalled.
pub fn router(metrics: Metrics, health: Health) -> Router {
    Router::new()
        .route("/metrics", get(metrics_text))
        .route("/live", get(live))
        .route("/ready", get(ready))
        .with_state(Shared { metrics, health })
}

async fn metrics_text(State(shared): State<Shared>) -> Response {
    match shared.metrics.render(&shared.health) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn live(State(shared): State<Shared>) -> Response {
    let stalled = shared.health.stalled();
    if stalled.is_empty() {
        "live\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("stalled: {}\n", stalled.join(", "))).into_response()
    }
}

async fn ready(State(shared): State<Shared>) -> Response {
    match shared.health.not_ready() {
        None => "ready\n".into_response(),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}
