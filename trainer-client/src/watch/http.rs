//! `/metrics`, for whoever asks for it.

use std::net::{SocketAddr, TcpListener};

use anyhow::Context;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;

use crate::failure::Failure;
use crate::watch::telemetry::Telemetry;

/// Serves `telemetry` at `listen` (`HOST:PORT`; port 0 takes a free one) until the process ends, on a thread of its
/// own, so that no step holds it up. Returns the address.
pub fn serve(listen: &str, telemetry: Telemetry) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(listen).map_err(|error| {
        Failure::Unavailable(format!(
            "cannot listen on --metrics-listen {listen}: {error}; give HOST:PORT with an address of this machine and a free port"
        ))
    })?;
    let address = listener.local_addr().context("the listener has no address")?;
    listener.set_nonblocking(true).context("cannot prepare the listener")?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start tokio")?;
    let router = Router::new().route("/metrics", get(metrics)).with_state(telemetry);
    std::thread::Builder::new().name("metrics".to_owned()).spawn(move || {
        let served = runtime
            .block_on(async move { axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await });
        if let Err(error) = served {
            tracing::error!(%error, "the metrics endpoint ended");
        }
    })?;
    Ok(address)
}

async fn metrics(State(telemetry): State<Telemetry>) -> Response {
    match telemetry.render() {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
