//! A service that stops as it should: an axum server under load, with a slow handler, an open stream and two jobs, is
//! sent a real SIGTERM, and loses nothing that it had accepted.
//!
//! ```text
//! cargo run --example graceful      # some four seconds
//! ```
//!
//! One [`Drain`] is what all parts share. The [`server`] takes a place for each request, the [`client`] asks as fast as
//! it is answered, and here is what a service's `main` does: start, wait for the signal, close, print the report, exit.
//!
//! Exits with 0 if every request that was accepted was answered in full, all streams were told goodbye, the one job that
//! listens to nobody is named in the report, and all that within the bound; with 1 if not.

#[cfg(unix)]
mod client;
#[cfg(unix)]
mod server;
#[cfg(unix)]
mod story;

#[cfg(unix)]
#[tokio::main]
async fn main() -> anyhow::Result<std::process::ExitCode> {
    story::tell().await
}

#[cfg(not(unix))]
fn main() {
    println!("there is no SIGTERM here");
}
