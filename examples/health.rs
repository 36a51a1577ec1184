//! A server says by itself that it is not ready while the peer that it cannot do without is down, and that it is again
//! when the peer is back.
//!
//! `cargo run --example health` serves `/livez`, `/readyz` and `/users` on loopback, and is its own client: it breaks the
//! peer, calls until the circuit opens, and watches the page flip and flip back. It exits with an error if that does
//! not happen, and takes about a second.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use anyhow::ensure;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use resile::health::{Check, HealthReport};
use resile::{CircuitBreaker, Health, Policy, Semaphore};

struct Service {
    policy: Policy,
    health: Health,
    /// Stands for the peer: whether it answers.
    peer_is_up: AtomicBool,
}

fn service() -> anyhow::Result<Service> {
    let breaker = CircuitBreaker::builder()
        .named("users")
        .consecutive_failures(5)
        .open_for(Duration::from_millis(300))
        .build()?;
    let semaphore = Semaphore::permits(64).max_queue(128).named("users queue").build()?;
    // Ten times as often as by default, since nobody wants to wait for an example.
    let health = Health::builder()
        .every(Duration::from_millis(50))
        .critical(&breaker)
        .check(Check::queue(&semaphore, 0.5..0.9))
        .build()?;
    let policy = Policy::named("users").timeout(Duration::from_secs(1)).gate(breaker).gate(semaphore).build()?;
    Ok(Service { policy, health, peer_is_up: AtomicBool::new(true) })
}

async fn users(State(service): State<Arc<Service>>) -> (StatusCode, String) {
    let ask = || async { if service.peer_is_up.load(Relaxed) { Ok("ann, bob") } else { Err("connection refused") } };
    match service.policy.run(ask).await {
        Ok(users) => (StatusCode::OK, users.to_owned()),
        Err(error) if error.is_refused() => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
        Err(error) => (StatusCode::BAD_GATEWAY, error.into_inner().unwrap_or("no answer").to_owned()),
    }
}

/// The report as JSON. It is plain data, so this is all there is to it.
fn page(report: &HealthReport) -> (StatusCode, String) {
    let reasons: Vec<String> = report
        .reasons
        .iter()
        .map(|reason| {
            let (signal, what, since) = (&reason.signal, reason.symptom.to_string(), reason.lasting.as_millis());
            format!(r#"{{"signal":{signal:?},"what":{what:?},"for_ms":{since}}}"#)
        })
        .collect();
    let status = if report.ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, format!(r#"{{"ok":{},"reasons":[{}]}}"#, report.ok, reasons.join(",")))
}

/// Asks for a page, and shows the answer.
async fn ask(server: SocketAddr, path: &str) -> anyhow::Result<u16> {
    let response = reqwest::get(format!("http://{server}{path}")).await?;
    let status = response.status().as_u16();
    println!("{path:8} {status} {}", response.text().await?);
    Ok(status)
}

/// Asks until the page has this status.
async fn wait_for(server: SocketAddr, path: &str, status: u16) -> anyhow::Result<()> {
    for _ in 0..100 {
        if ask(server, path).await? == status {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    anyhow::bail!("{path} does not come to {status}")
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let service = Arc::new(service()?);
    let app = Router::new()
        .route("/livez", get(async |State(service): State<Arc<Service>>| page(&service.health.live())))
        .route("/readyz", get(async |State(service): State<Arc<Service>>| page(&service.health.ready())))
        .route("/users", get(users))
        .with_state(service.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let server = listener.local_addr()?;
    let serving = tokio::spawn(axum::serve(listener, app).into_future());

    println!("-- all is well");
    ensure!(ask(server, "/users").await? == 200);
    wait_for(server, "/readyz", 200).await?;

    println!("-- the peer goes down: five calls fail, the circuit opens");
    service.peer_is_up.store(false, Relaxed);
    for _ in 0..5 {
        ensure!(ask(server, "/users").await? == 502);
    }
    wait_for(server, "/readyz", 503).await?;
    ensure!(ask(server, "/livez").await? == 200, "a restart would not help");

    println!("-- the peer is back: the circuit lets probes through, so the server wants traffic again");
    service.peer_is_up.store(true, Relaxed);
    wait_for(server, "/readyz", 200).await?;
    for _ in 0..5 {
        ensure!(ask(server, "/users").await? == 200);
    }
    wait_for(server, "/readyz", 200).await?;

    serving.abort();
    println!("the page has flipped and flipped back");
    Ok(())
}
