//! The API: axum on a port of loopback. `GET /orders` and `GET /search`, with the tenant's name in a header.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::serve::ListenerExt as _;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::limits::{Limits, plan_of};

/// What is counted together in the chart.
pub const SLICE: Duration = Duration::from_millis(250);
const SLICES: usize = 200;

/// What became of the requests of a slice.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slice {
    pub honest: u64,
    pub flood: u64,
    pub refused: u64,
}

/// A running server. Dropping it ends it.
pub struct Server {
    pub address: SocketAddr,
    stage: Arc<Stage>,
    // Held, because dropping the set ends the server.
    _serving: JoinSet<()>,
}

struct Stage {
    limits: Arc<Limits>,
    begin: Instant,
    /// By slice: honest, flood, refused.
    counts: Vec<[AtomicU64; 3]>,
}

impl Server {
    pub async fn start(limits: Arc<Limits>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("cannot bind a loopback port")?;
        let address = listener.local_addr()?;
        // Answers go out at once, not when the last one was acknowledged.
        let listener = listener.tap_io(|connection| _ = connection.set_nodelay(true));
        let counts = (0..SLICES).map(|_| Default::default()).collect();
        let stage = Arc::new(Stage { limits, begin: Instant::now(), counts });
        let router =
            Router::new().route("/orders", get(answer)).route("/search", get(answer)).with_state(Arc::clone(&stage));
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                eprintln!("the server ended: {error}");
            }
        });
        Ok(Self { address, stage, _serving: serving })
    }

    /// How many requests were decided on.
    pub fn seen(&self) -> u64 {
        self.stage.counts.iter().flatten().map(|count| count.load(Relaxed)).sum()
    }

    /// What became of the requests over time.
    pub fn slices(&self) -> Vec<Slice> {
        let count = |slice: &[AtomicU64; 3]| {
            let [honest, flood, refused] = slice.each_ref().map(|count| count.load(Relaxed));
            Slice { honest, flood, refused }
        };
        let mut slices: Vec<Slice> = self.stage.counts.iter().map(count).collect();
        let used = slices.iter().rposition(|slice| slice.honest + slice.flood + slice.refused > 0);
        slices.truncate(used.map_or(0, |last| last + 1));
        slices
    }
}

async fn answer(State(stage): State<Arc<Stage>>, headers: HeaderMap, request: Request) -> Response {
    let tenant = headers.get("x-tenant").and_then(|name| name.to_str().ok()).unwrap_or_default();
    let admitted = stage.limits.admit(tenant, request.uri().path()).await;
    let what = match &admitted {
        Ok(()) => usize::from(plan_of(tenant) == "nobody"),
        Err(_) => 2,
    };
    let slice = (stage.begin.elapsed().as_nanos() / SLICE.as_nanos()) as usize;
    stage.counts[slice.min(SLICES - 1)][what].fetch_add(1, Relaxed);
    match admitted {
        Ok(()) => StatusCode::OK.into_response(),
        Err(error) => {
            // Whole seconds, rounded up, so that waiting as told suffices.
            let after = error.retry_after().map(|after| after.as_nanos().div_ceil(1_000_000_000).to_string());
            let mut response = StatusCode::TOO_MANY_REQUESTS.into_response();
            if let Some(after) = after.and_then(|after| after.parse().ok()) {
                response.headers_mut().insert(RETRY_AFTER, after);
            }
            response
        }
    }
}
