//! Who calls: honest tenants at their pace, and a flood as fast as it goes.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

pub const HONEST: u32 = 20;
/// Names that are made up, each for one request.
pub const FLOOD: u64 = 100_000;
const CONNECTIONS: u64 = 4;
/// Requests that are written before their answers are read.
const PIPELINED: u64 = 50;
/// Between two requests of a tenant: less than half of what it has bought.
const PACE: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, Default)]
pub struct Answers {
    pub sent: u64,
    /// With 200.
    pub answered: u64,
}

impl Answers {
    pub fn add(&mut self, other: Self) {
        self.sent += other.sent;
        self.answered += other.answered;
    }
}

pub struct Tenant {
    stop: CancellationToken,
    work: JoinHandle<anyhow::Result<Answers>>,
}

impl Tenant {
    pub async fn stop(self) -> anyhow::Result<Answers> {
        self.stop.cancel();
        self.work.await?
    }
}

/// A tenant that calls both endpoints in turn until it is stopped. A quarter of them have the larger plan.
pub fn tenant(server: SocketAddr, number: u32) -> Tenant {
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let name = if number % 4 == 0 { format!("gold-{number}") } else { format!("silver-{number}") };
    let work = tokio::spawn(async move {
        let client = reqwest::Client::new();
        let mut answers = Answers::default();
        let mut pace = interval(PACE);
        // One that was held up does not make up for it.
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !stopped.is_cancelled() {
            pace.tick().await;
            let path = if answers.sent % 2 == 0 { "orders" } else { "search" };
            let request = client.get(format!("http://{server}/{path}")).header("x-tenant", &name);
            answers.sent += 1;
            answers.answered += u64::from(request.send().await.is_ok_and(|response| response.status() == 200));
        }
        Ok(answers)
    });
    Tenant { stop, work }
}

/// All names once, over a few connections.
pub async fn flood(server: SocketAddr, until: Instant) -> anyhow::Result<Answers> {
    let mut connections = JoinSet::new();
    for connection in 0..CONNECTIONS {
        let names = connection * (FLOOD / CONNECTIONS)..(connection + 1) * (FLOOD / CONNECTIONS);
        connections.spawn(flood_connection(server, names, until));
    }
    let mut answers = Answers::default();
    while let Some(of_one) = connections.join_next().await {
        answers.add(of_one??);
    }
    Ok(answers)
}

async fn flood_connection(
    server: SocketAddr,
    mut names: std::ops::Range<u64>,
    until: Instant,
) -> anyhow::Result<Answers> {
    let mut stream = TcpStream::connect(server).await.context("cannot connect to the server")?;
    stream.set_nodelay(true)?;
    let mut answers = Answers::default();
    let (mut requests, mut received) = (String::new(), Vec::new());
    while !names.is_empty() && Instant::now() < until {
        requests.clear();
        let mut expected = 0;
        for name in names.by_ref().take(PIPELINED as usize) {
            let path = if name % 2 == 0 { "orders" } else { "search" };
            write!(requests, "GET /{path} HTTP/1.1\r\nhost: {server}\r\nx-tenant: made-up-{name}\r\n\r\n")?;
            expected += 1;
        }
        stream.write_all(requests.as_bytes()).await?;
        answers.sent += expected;
        while expected > 0 {
            anyhow::ensure!(stream.read_buf(&mut received).await? > 0, "the server hung up");
            while let Some(end) = received.windows(4).position(|four| four == b"\r\n\r\n") {
                // No answer has a body.
                answers.answered += u64::from(received.starts_with(b"HTTP/1.1 200"));
                received.drain(..end + 4);
                expected -= 1;
            }
        }
    }
    Ok(answers)
}
