//! Clients that ask as fast as they are answered, and some that listen to a stream, until there is no server any more.

use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use futures::future::join_all;
use reqwest::{Client, Response, StatusCode};
use tokio::task::JoinHandle;

use crate::server::ID;

const CLIENTS: u64 = 32;
pub const STREAMS: u64 = 4;
/// Requests take from this many milliseconds on, in steps, to some 600.
const QUICKEST: u64 = 20;

/// What the clients have seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// The numbers of the requests that were answered in full.
    pub answered: HashSet<u64>,
    /// How many were told that the server shuts down.
    refused: u64,
    /// How many found no server, or lost it.
    unanswered: u64,
    /// How many streams ended with a goodbye, and how many otherwise.
    pub streams: (u64, u64),
}

pub struct Load {
    clients: Vec<JoinHandle<Seen>>,
}

impl Load {
    pub fn start(address: SocketAddr) -> Self {
        let client = Client::builder().no_proxy().build().expect("a client without settings can be built");
        let ids = Arc::new(AtomicU64::new(1));
        let asking = (0..CLIENTS).map(|_| tokio::spawn(ask(client.clone(), address, Arc::clone(&ids))));
        let listening = (0..STREAMS).map(|_| tokio::spawn(listen(client.clone(), address)));
        Self { clients: asking.chain(listening).collect() }
    }

    /// Waits for the end of all clients.
    pub async fn finish(self) -> Seen {
        let mut all = Seen::default();
        for seen in join_all(self.clients).await {
            let seen = seen.expect("a client does not panic");
            all.answered.extend(seen.answered);
            all.refused += seen.refused;
            all.unanswered += seen.unanswered;
            all.streams.0 += seen.streams.0;
            all.streams.1 += seen.streams.1;
        }
        all
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (goodbyes, others) = self.streams;
        write!(f, "{} answered, {} refused, {} found nobody; ", self.answered.len(), self.refused, self.unanswered)?;
        write!(f, "{goodbyes} streams ended with a goodbye, {others} otherwise")
    }
}

/// One request after the other, until one is not answered.
async fn ask(client: Client, address: SocketAddr, ids: Arc<AtomicU64>) -> Seen {
    let mut seen = Seen::default();
    loop {
        let id = ids.fetch_add(1, Relaxed);
        let millis = QUICKEST + id * 37 % 580;
        let sent = client.get(format!("http://{address}/slow/{millis}")).header(ID, id).send().await;
        match whole(sent).await {
            Ok((StatusCode::OK, text)) if text == format!("waited {millis} ms") => {
                seen.answered.insert(id);
            }
            Ok((StatusCode::SERVICE_UNAVAILABLE, _)) => seen.refused += 1,
            _ => {
                seen.unanswered += 1;
                return seen;
            }
        }
    }
}

async fn listen(client: Client, address: SocketAddr) -> Seen {
    let heard = whole(client.get(format!("http://{address}/events")).send().await).await;
    let goodbye = matches!(heard, Ok((StatusCode::OK, text)) if text.ends_with("event: goodbye\ndata: shutdown\n\n"));
    Seen { streams: if goodbye { (1, 0) } else { (0, 1) }, ..Seen::default() }
}

/// The answer with its whole body.
async fn whole(sent: reqwest::Result<Response>) -> reqwest::Result<(StatusCode, String)> {
    let response = sent?;
    Ok((response.status(), response.text().await?))
}
