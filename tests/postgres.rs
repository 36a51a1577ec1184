//! What a call that ends early leaves behind at its peer, shown on a real Postgres: by a drop, with a cleanup, and
//! behind a shield.
//!
//! The server is another process, so time here is real: a test looks at it until it is where it should be, and gives up
//! after a bounded number of looks. Where a transaction has to stand still, it waits for a lock that the test holds.

#![cfg(unix)]

mod support;

use std::fmt::Debug;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;

use resile::{ErrorKind, Policy, Semaphore};
use tokio_postgres::error::SqlState;
use tokio_postgres::{CancelToken, Client, Error, NoTls};

use support::ms;
use support::postgres::{Observer, Postgres};

/// A statement that the server is at for longer than any test lasts.
const SLEEP: &str = "select pg_sleep(30)";

/// Inside of a transaction: waits until the test gives its lock back.
const WAIT: &str = "select pg_advisory_xact_lock(1)";

/// Polls a call until the server has come to a point, and drops it there.
async fn leave<F: Future<Output: Debug>>(call: F, there: impl Future<Output = ()>) {
    let mut call = pin!(call);
    tokio::select! {
        end = &mut call => panic!("nothing lets it end: {end:?}"),
        () = there => {}
    }
}

/// A table of payments, and the test holds the lock that a payment waits for.
async fn open_a_shop(observer: &Observer) {
    observer.0.batch_execute("create table payments (id int); select pg_advisory_lock(1)").await.unwrap();
}

async fn unlock(observer: &Observer) {
    observer.0.batch_execute("select pg_advisory_unlock(1)").await.unwrap();
}

/// How many payments this connection can see.
async fn payments(client: &Client) -> i64 {
    client.query_one("select count(*) from payments", &[]).await.unwrap().get(0)
}

/// A transaction, statement by statement.
async fn pay(client: &Client) -> Result<(), Error> {
    client.batch_execute("begin").await?;
    client.batch_execute("insert into payments values (1)").await?;
    client.batch_execute(WAIT).await?;
    client.batch_execute("commit").await
}

// Drop.

#[tokio::test]
async fn a_query_that_is_dropped_goes_on_at_the_server() {
    let server = Postgres::start();
    let ((client, pid), observer) = (server.connect().await, server.observe().await);
    let slots = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("db").gate(slots.clone()).build().unwrap();

    leave(policy.run(|| client.batch_execute(SLEEP)), observer.until(pid, "active", SLEEP)).await;
    // Here it is over, and the next one may come; the server has not been told.
    assert_eq!(slots.in_use(), 0);
    observer.pause().await;
    assert_eq!(observer.sees(pid).await.unwrap(), ("active".into(), SLEEP.into()));

    observer.cancel(pid).await;
    observer.until(pid, "idle", SLEEP).await;
    client.batch_execute("select 1").await.unwrap();
}

#[tokio::test]
async fn a_query_goes_on_at_the_server_even_if_its_connection_is_dropped_with_it() {
    let server = Postgres::start();
    let ((client, pid), observer) = (server.connect().await, server.observe().await);
    let policy = Policy::named("db").build().unwrap();

    let query = policy.run_once(async move { client.batch_execute(SLEEP).await });
    leave(query, observer.until(pid, "active", SLEEP)).await;
    observer.pause().await;
    assert_eq!(observer.sees(pid).await.unwrap(), ("active".into(), SLEEP.into()));

    observer.cancel(pid).await;
    observer.until_gone(pid).await;
}

#[tokio::test]
async fn a_query_that_timed_out_goes_on_at_the_server() {
    let server = Postgres::start();
    let ((client, pid), observer) = (server.connect().await, server.observe().await);
    let policy = Policy::named("db").timeout(ms(50)).build().unwrap();

    let error = policy.run(|| client.batch_execute(SLEEP)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    observer.until(pid, "active", SLEEP).await;
}

#[tokio::test]
async fn a_query_that_the_server_is_told_to_stop_fails_with_its_error() {
    let server = Postgres::start();
    let ((client, pid), observer) = (server.connect().await, server.observe().await);
    let policy = Policy::named("db").build().unwrap();
    let stop = async {
        observer.until(pid, "active", SLEEP).await;
        observer.cancel(pid).await;
    };

    let (end, ()) = tokio::join!(policy.run(|| client.batch_execute(SLEEP)), stop);
    let error = end.unwrap_err().into_inner().unwrap();
    assert_eq!(error.code(), Some(&SqlState::QUERY_CANCELED));
}

#[tokio::test]
async fn a_transaction_that_is_dropped_is_left_open_for_the_next_user_of_its_connection() {
    let server = Postgres::start();
    let ((client, pid), observer) = (server.connect().await, server.observe().await);
    open_a_shop(&observer).await;
    let policy = Policy::named("db").build().unwrap();

    leave(policy.run(|| pay(&client)), observer.until(pid, "active", WAIT)).await;
    unlock(&observer).await;
    observer.until(pid, "idle in transaction", WAIT).await;
    assert_eq!(payments(&observer.0).await, 0);
    // Whoever comes next on this connection stands in the middle of it.
    assert_eq!(payments(&client).await, 1);
}

#[tokio::test]
async fn a_transaction_with_a_guard_is_rolled_back_once_its_statement_has_ended() {
    let server = Postgres::start();
    let ((mut client, pid), observer) = (server.connect().await, server.observe().await);
    open_a_shop(&observer).await;
    let policy = Policy::named("db").build().unwrap();

    let pay = async {
        let transaction = client.transaction().await?;
        transaction.batch_execute("insert into payments values (1)").await?;
        transaction.batch_execute(WAIT).await?;
        transaction.commit().await
    };
    leave(policy.run_once(pay), observer.until(pid, "active", WAIT)).await;
    // The guard's rollback has to wait for the statement: nobody stops that.
    observer.pause().await;
    assert_eq!(observer.sees(pid).await.unwrap(), ("active".into(), WAIT.into()));

    unlock(&observer).await;
    observer.until(pid, "idle", "ROLLBACK").await;
    assert_eq!(payments(&observer.0).await, 0);
}

#[tokio::test]
async fn a_transaction_sent_as_one_is_committed_although_it_is_dropped() {
    let server = Postgres::start();
    let ((client, pid), observer) = (server.connect().await, server.observe().await);
    open_a_shop(&observer).await;
    let policy = Policy::named("db").build().unwrap();

    let pay = format!("begin; insert into payments values (1); {WAIT}; commit");
    leave(policy.run(|| client.batch_execute(&pay)), observer.until(pid, "active", WAIT)).await;
    unlock(&observer).await;
    observer.until(pid, "idle", WAIT).await;
    assert_eq!(payments(&observer.0).await, 1);
}

// Drop and clean up.

#[tokio::test]
async fn a_cleanup_stops_the_query_at_the_server() {
    let server = Postgres::start();
    let ((client, pid), observer) = (server.connect().await, server.observe().await);
    let policy = Policy::named("db").build().unwrap();

    let query = policy
        .call()
        .cleanup(|query: CancelToken, _| async move { query.cancel_query(NoTls).await.unwrap() })
        .run(|| (client.cancel_token(), client.batch_execute(SLEEP)));
    leave(query, observer.until(pid, "active", SLEEP)).await;
    policy.tasks().idle().await;
    assert_eq!((policy.tasks().cleaned(), policy.tasks().failed()), (1, 0));
    observer.until(pid, "idle", SLEEP).await;
    client.batch_execute("select 1").await.unwrap();
}

#[tokio::test]
async fn a_cleanup_stops_a_query_that_timed_out() {
    let server = Postgres::start();
    let ((client, pid), observer) = (server.connect().await, server.observe().await);
    let policy = Policy::named("db").timeout(ms(50)).build().unwrap();

    let observer = Arc::new(observer);
    let sees = observer.clone();
    let query = policy
        .call()
        .cleanup(move |query: CancelToken, _| {
            let observer = sees.clone();
            async move {
                // The timeout may have come before the server has begun, and then there is nothing to stop yet.
                observer.until(pid, "active", SLEEP).await;
                query.cancel_query(NoTls).await.unwrap();
            }
        })
        .run(|| (client.cancel_token(), client.batch_execute(SLEEP)));
    assert_eq!(query.await.unwrap_err().kind(), ErrorKind::TimedOut);
    policy.tasks().idle().await;
    assert_eq!((policy.tasks().cleaned(), policy.tasks().failed()), (1, 0));
    observer.until(pid, "idle", SLEEP).await;
}

#[tokio::test]
async fn a_cleanup_rolls_a_transaction_back() {
    let server = Postgres::start();
    let ((client, pid), observer) = (server.connect().await, server.observe().await);
    let client = Arc::new(client);
    open_a_shop(&observer).await;
    let policy = Policy::named("db").build().unwrap();

    let call = policy
        .call()
        .cleanup(|client: Arc<Client>, _| async move {
            client.cancel_token().cancel_query(NoTls).await.unwrap();
            client.batch_execute("rollback").await.unwrap();
        })
        .run(|| (client.clone(), pay(&client)));
    leave(call, observer.until(pid, "active", WAIT)).await;
    policy.tasks().idle().await;
    assert_eq!((policy.tasks().cleaned(), policy.tasks().failed()), (1, 0));
    // The lock it waited for was not given back: it was stopped.
    observer.until(pid, "idle", "rollback").await;
    assert_eq!((payments(&observer.0).await, payments(&client).await), (0, 0));
}

// Shield.

#[tokio::test]
async fn a_shielded_transaction_is_committed_although_its_caller_has_left() {
    let server = Postgres::start();
    let ((client, pid), observer) = (server.connect().await, server.observe().await);
    let client = Arc::new(client);
    open_a_shop(&observer).await;
    let slots = Semaphore::permits(1).build().unwrap();
    let policy = Policy::named("db").gate(slots.clone()).build().unwrap();

    let call = policy.call().shield().run(move || {
        let client = client.clone();
        async move { pay(&client).await }
    });
    leave(call, observer.until(pid, "active", WAIT)).await;
    // The permit is not there for the next one while the server is still at it.
    assert_eq!((slots.in_use(), policy.tasks().running()), (1, 1));
    assert_eq!(payments(&observer.0).await, 0);

    unlock(&observer).await;
    policy.tasks().idle().await;
    assert_eq!((slots.in_use(), policy.tasks().running()), (0, 0));
    assert_eq!(payments(&observer.0).await, 1);
}

// The server of these tests.

#[tokio::test]
async fn a_server_is_gone_with_its_test_even_if_that_panics() {
    let server = Postgres::start();
    let directory = server.directory.clone();
    assert!(directory.join("data").is_dir());
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _server = server;
        panic!("as a test that fails");
    }));
    assert!(panicked.is_err());
    // Its files are the last to go, after its processes.
    assert!(!directory.exists());
}
