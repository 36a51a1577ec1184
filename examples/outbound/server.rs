//! A real HTTP server on loopback that acts out a [`Script`]: hyper on its own listener, with limited [`Capacity`].
//!
//! `GET /item/N` answers with the [`body`] of `N`. Everything else that can happen to a caller is in [`Script`].

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::RETRY_AFTER;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::capacity::Capacity;
use crate::script::{Script, Weather};

/// What `GET /item/N` brings when all is well. Long enough to be cut in half.
pub fn body(id: u64) -> Bytes {
    let line = format!("item {id} of many\n");
    Bytes::from(line.repeat(64))
}

/// The caller is left without a (whole) answer: the connection is reset.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the script resets this connection")]
pub struct Reset;

type Body = BoxBody<Bytes, Reset>;

/// A running server. Dropping it ends it.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stage: Arc<Stage>,
    // Held, because dropping the set ends the server.
    _serving: JoinSet<()>,
}

impl Server {
    /// Binds a port of loopback and begins to act at `start`.
    pub async fn start(script: Arc<Script>, start: Instant) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("cannot bind a loopback port")?;
        let address = listener.local_addr()?;
        let stage = Arc::new(Stage::new(script, start));
        let mut serving = JoinSet::new();
        serving.spawn(Arc::clone(&stage).serve(listener, address));
        Ok(Self { address, stage, _serving: serving })
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Requests that arrived in each phase, whatever became of them.
    pub fn seen(&self) -> Vec<u64> {
        self.stage.seen.iter().map(|seen| seen.load(Relaxed)).collect()
    }

    /// Requests that were worked on for a client that had gone.
    pub fn in_vain(&self) -> u64 {
        self.stage.capacity.in_vain()
    }

    /// Requests inside now.
    pub fn inside(&self) -> usize {
        self.stage.capacity.inside()
    }
}

/// What the connections of one server share.
#[derive(Debug)]
struct Stage {
    script: Arc<Script>,
    start: Instant,
    capacity: Arc<Capacity>,
    quota: Mutex<Quota>,
    seen: Vec<AtomicU64>,
}

impl Stage {
    fn new(script: Arc<Script>, start: Instant) -> Self {
        let seen = script.phases.iter().map(|_| AtomicU64::new(0)).collect();
        Self { script, start, capacity: Arc::new(Capacity::new()), quota: Mutex::new(Quota::default()), seen }
    }

    /// Listens, dies where the script says so, and comes back on the same port.
    async fn serve(self: Arc<Self>, mut listener: TcpListener, address: SocketAddr) {
        let mut outages = self.outages().into_iter();
        loop {
            let outage = outages.next();
            let mut connections = JoinSet::new();
            let accepting = async {
                loop {
                    while connections.try_join_next().is_some() {}
                    match listener.accept().await {
                        Ok((stream, _)) => drop(connections.spawn(Arc::clone(&self).connection(stream))),
                        // Out of file descriptors, most likely: let some be closed.
                        Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                    }
                }
            };
            let Some((begins, ends)) = outage else { return accepting.await };
            tokio::select! {
                () = accepting => {}
                () = tokio::time::sleep_until(begins) => {}
            }
            drop(listener);
            connections.shutdown().await;
            self.capacity.crash();
            tokio::time::sleep_until(ends).await;
            listener = loop {
                match TcpListener::bind(address).await {
                    Ok(listener) => break listener,
                    Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                }
            };
        }
    }

    /// The times at which nobody listens.
    fn outages(&self) -> Vec<(Instant, Instant)> {
        let mut begins = self.start;
        let mut outages = Vec::new();
        for phase in &self.script.phases {
            let ends = begins + phase.lasts;
            if matches!(phase.weather, Weather::Refusing) {
                outages.push((begins, ends));
            }
            begins = ends;
        }
        outages
    }

    async fn connection(self: Arc<Self>, stream: TcpStream) {
        let answer = service_fn(|request| Box::pin(self.answer(request)));
        let mut connection = http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
        // Without the shutdown, so that a broken connection can end in a reset and not in a polite goodbye.
        let ended = std::future::poll_fn(|cx| connection.poll_without_shutdown(cx)).await;
        let stream = connection.into_parts().io.into_inner();
        if ended.is_err() {
            // Best effort: a stream that is gone already can't be reset any more.
            let _ = stream.set_zero_linger();
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, Reset> {
        let (phase, into) = self.script.at(self.start.elapsed());
        let nth = self.seen[phase].fetch_add(1, Relaxed);
        let throw = |die: u64| self.script.throw(nth, (phase as u64) << 8 | die);
        let Some(id) = request.uri().path().strip_prefix("/item/").and_then(|id| id.parse().ok()) else {
            return Ok(plain(StatusCode::NOT_FOUND));
        };
        let Some(place) = self.capacity.place() else {
            return Ok(plain(StatusCode::SERVICE_UNAVAILABLE));
        };

        // No request is like another, and the mean is one.
        let mut times = 0.5 + throw(0);
        let mut at_least = Duration::ZERO;
        let mut cut = false;
        match self.script.phases[phase].weather {
            Weather::SlowTail { share, shortest, longest } if throw(1) < share => {
                at_least = shortest + longest.saturating_sub(shortest).mul_f64(throw(2));
            }
            Weather::Bursts { every, lasts } => {
                if into.as_nanos() % every.as_nanos() < lasts.as_nanos() {
                    return Ok(plain(StatusCode::SERVICE_UNAVAILABLE));
                }
            }
            Weather::Quota { per_second, burst, bite, every } => {
                let bites = (into.as_nanos() / every.as_nanos()) as u32 + 1;
                if !self.quota.lock().allows(into, per_second, burst, f64::from(bites) * bite) {
                    let mut refusal = plain(StatusCode::TOO_MANY_REQUESTS);
                    refusal.headers_mut().insert(RETRY_AFTER, 1.into());
                    return Ok(refusal);
                }
            }
            Weather::Broken { reset, .. } if throw(1) < reset => return Err(Reset),
            Weather::Broken { cut: share, .. } => cut = throw(2) < share,
            // The client may leave meanwhile; hyper then drops this future, and the place with it.
            Weather::Hanging => tokio::time::sleep(self.script.phases[phase].lasts.saturating_sub(into)).await,
            Weather::Cold { slower, lasts } if into < lasts => times *= slower,
            Weather::Fair | Weather::SlowTail { .. } | Weather::Cold { .. } | Weather::Refusing => {}
        }
        place.work(times, at_least).await.ok_or(Reset)?;
        Ok(if cut { half(&body(id)) } else { Response::new(Full::new(body(id)).map_err(never).boxed()) })
    }
}

/// A leaky bucket as many APIs have it: what it refuses runs in all the same.
#[derive(Debug, Default)]
struct Quota {
    level: f64,
    at: Duration,
    bitten: f64,
}

impl Quota {
    /// Counts one request at the time `now` of the phase, when the neighbour has eaten `bitten` in all.
    fn allows(&mut self, now: Duration, per_second: f64, burst: f64, bitten: f64) -> bool {
        let leaked = now.saturating_sub(self.at).as_secs_f64() * per_second;
        let eaten = bitten - self.bitten;
        // The debt ends at one second's worth, or a storm would have to be paid for until the end of the phase.
        self.level = ((self.level - leaked).max(0.0) + eaten + 1.0).min(burst + per_second);
        self.at = self.at.max(now);
        self.bitten = bitten;
        self.level <= burst
    }
}

fn plain(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from_static(b"not now\n")).map_err(never).boxed());
    *response.status_mut() = status;
    response
}

/// Promises the whole body, sends its first half, and breaks.
fn half(whole: &Bytes) -> Response<Body> {
    let length = whole.len();
    let first = whole.slice(..length / 2);
    let broken = async {
        // Long enough for the first half to leave.
        tokio::time::sleep(Duration::from_millis(2)).await;
        Err(Reset)
    };
    let frames = stream::iter([Ok(Frame::data(first))]).chain(stream::once(broken));
    let mut response = Response::new(BoxBody::new(StreamBody::new(frames)));
    response.headers_mut().insert(hyper::header::CONTENT_LENGTH, length.into());
    response
}

fn never(never: Infallible) -> Reset {
    match never {}
}
