//! An HTTP server whose requests and connections have their places in the drain.

use std::collections::HashSet;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::http::header::CONNECTION;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::{Stream, StreamExt as _, stream};
use http_body_util::BodyExt as _;
use parking_lot::Mutex;
use resile::Drain;
use tokio::net::TcpListener;
use tokio::time::{interval, sleep};

/// The header in which a client numbers its requests.
pub const ID: &str = "x-id";

pub struct Server {
    pub address: SocketAddr,
    /// The numbers of the requests that were let in.
    pub ledger: Ledger,
}

type Ledger = Arc<Mutex<HashSet<u64>>>;

/// Serves on a port of loopback until the drain closes.
pub async fn start(drain: Drain) -> anyhow::Result<Server> {
    let ledger = Ledger::default();
    let app = Router::new()
        .route("/slow/{millis}", get(slow))
        .route("/events", get(events))
        .layer(from_fn_with_state((drain.clone(), Arc::clone(&ledger)), admit))
        .with_state(drain.clone());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    let serving = axum::serve(listener, app).with_graceful_shutdown(drain.closing());
    // The server has a place too, which it holds until its last connection has sent its last byte.
    let place = drain.track("server")?;
    tokio::spawn(async move {
        let served = serving.await;
        drop(place);
        served
    });
    Ok(Server { address, ledger })
}

/// Lets a request in, or refuses it; its place is held by the body of its response, so until that is sent or dropped.
async fn admit(State((drain, ledger)): State<(Drain, Ledger)>, request: Request, next: Next) -> Response {
    let Ok(place) = drain.track(request.uri().path().split('/').nth(1).unwrap_or_default().to_owned()) else {
        return (StatusCode::SERVICE_UNAVAILABLE, [(CONNECTION, "close")], "shutting down").into_response();
    };
    ledger.lock().extend(id(&request));
    next.run(request).await.map(|body| {
        Body::new(body.map_frame(move |frame| {
            let _held = &place;
            frame
        }))
    })
}

fn id(request: &Request) -> Option<u64> {
    request.headers().get(ID)?.to_str().ok()?.parse().ok()
}

async fn slow(Path(millis): Path<u64>) -> String {
    sleep(Duration::from_millis(millis)).await;
    format!("waited {millis} ms")
}

/// A tick every 100 ms, without end, until the grace is over; then a last word.
async fn events(State(drain): State<Drain>) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let cancel = drain.cancel_token();
    let goodbye = cancel.cancelled();
    let ticks = stream::unfold(interval(Duration::from_millis(100)), |mut interval| async {
        interval.tick().await;
        Some((Event::default().data("tick"), interval))
    });
    let last = stream::once(async move { Event::default().event("goodbye").data(goodbye.await.to_string()) });
    Sse::new(ticks.take_until(cancel.cancelled()).chain(last).map(Ok))
}
