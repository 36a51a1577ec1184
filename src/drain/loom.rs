//! Entering, leaving and closing at the same time.

use std::pin::pin;
use std::sync::atomic::AtomicU32;
use std::task::{Context, Poll, Wake, Waker};

use ::loom::sync::Notify;
use ::loom::thread::{self, JoinHandle};
use futures::FutureExt;

use super::builder::LONGEST_CANCEL_WAIT;
use super::closing::{Driver, Round};
use super::*;
use crate::loom::{block_on, explore};

/// Cancels after the grace, and waits for nobody then.
fn drain() -> Drain {
    Drain::builder().cancel_wait(Duration::ZERO).build().unwrap()
}

fn begin(drain: &Drain, grace: Duration) -> (Arc<Round>, Driver) {
    let (round, driver) = drain.0.begin(grace);
    (round, driver.expect("nobody else has closed"))
}

fn report(round: Arc<Round>) -> Drained {
    round.ended().now_or_never().expect("the closing is over")
}

fn close(drain: &Drain, grace: Duration) -> Drained {
    let (round, driver) = begin(drain, grace);
    block_on(driver);
    report(round)
}

fn spawn_drop(guard: Guard) -> JoinHandle<()> {
    thread::spawn(move || drop(guard))
}

fn assert_done(drain: &Drain, in_flight: u64) {
    assert_eq!((drain.phase(), drain.in_flight()), (Phase::Done, in_flight));
    assert_eq!(drain.try_acquire().unwrap_err().reason(), Reason::Draining);
}

#[test]
fn nobody_is_in_when_it_is_done_and_nobody_comes_in_after() {
    explore(|| {
        let drain = drain();
        let inside = Arc::new(AtomicU32::new(0));
        let callers = [(); 2].map(|()| {
            let (drain, inside) = (drain.clone(), inside.clone());
            thread::spawn(move || {
                let Ok(guard) = drain.try_acquire() else { return 0 };
                inside.fetch_add(1, Relaxed);
                assert!(drain.in_flight() > 0 && drain.phase() != Phase::Done);
                inside.fetch_sub(1, Relaxed);
                drop(guard);
                1
            })
        });
        let report = close(&drain, Duration::MAX);
        assert_eq!(inside.load(Relaxed), 0);
        let admitted: u64 = callers.into_iter().map(|caller| caller.join().unwrap()).sum();
        assert!(report.finished() <= admitted, "those who had left before are not in it");
        assert!(report.is_clean());
        assert_done(&drain, 0);
    });
}

#[test]
fn the_last_one_out_wakes_the_driver_once() {
    struct Bell(Notify, AtomicU32);

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {
            self.1.fetch_add(1, Relaxed);
            self.0.notify();
        }
    }

    explore(|| {
        let drain = drain();
        let leavers = [(); 2].map(|()| spawn_drop(drain.try_acquire().unwrap()));
        let bell = Arc::new(Bell(Notify::new(), AtomicU32::new(0)));
        let waker = Waker::from(bell.clone());
        let (round, driver) = begin(&drain, Duration::MAX);
        {
            let mut driver = pin!(driver);
            while driver.as_mut().poll(&mut Context::from_waker(&waker)) == Poll::Pending {
                bell.0.wait();
            }
        }
        leavers.into_iter().for_each(|leaver| leaver.join().unwrap());
        assert!(bell.1.load(Relaxed) <= 1);
        assert!(report(round).is_clean());
        assert_done(&drain, 0);
    });
}

#[test]
fn who_leaves_when_time_is_up_is_out_or_in_the_report_by_name() {
    explore(|| {
        let drain = drain();
        let leaver = spawn_drop(drain.track("job").unwrap());
        let report = close(&drain, Duration::ZERO);
        assert!(report.finished() + report.cancelled() + report.still_in() <= 1);
        assert_eq!(report.stuck().len() as u64, report.still_in());
        assert_eq!(report.unnamed(), 0);
        leaver.join().unwrap();
        assert_done(&drain, 0);
    });
}

#[test]
fn who_leaves_after_it_was_told_ends_the_wait_too() {
    explore(|| {
        let drain = Drain::builder().cancel_wait(LONGEST_CANCEL_WAIT).build().unwrap();
        let leaver = spawn_drop(drain.try_acquire().unwrap());
        assert_eq!(close(&drain, Duration::ZERO).still_in(), 0);
        leaver.join().unwrap();
        assert_done(&drain, 0);
    });
}

#[test]
fn of_two_who_close_one_drives_and_both_have_its_report() {
    explore(|| {
        let drain = drain();
        let leaver = spawn_drop(drain.try_acquire().unwrap());
        let closer = |drain: Drain| {
            move || {
                let (round, driver) = drain.0.begin(Duration::MAX);
                let drives = driver.is_some();
                driver.into_iter().for_each(block_on);
                (round, drives)
            }
        };
        let other = thread::spawn(closer(drain.clone()));
        let (here, there) = (closer(drain.clone())(), other.join().unwrap());
        assert!(here.1 ^ there.1);
        assert!(Arc::ptr_eq(&here.0, &there.0));
        assert!(report(here.0).is_clean());
        leaver.join().unwrap();
        assert_done(&drain, 0);
    });
}

#[test]
fn a_grace_that_is_cut_short_reaches_a_driver_on_its_way_to_sleep() {
    explore(|| {
        let drain = drain();
        let stuck = drain.try_acquire().unwrap();
        let (round, driver) = begin(&drain, Duration::MAX);
        let driver = thread::spawn(move || block_on(driver));
        let (_, second) = drain.0.begin(Duration::ZERO);
        assert!(second.is_none());
        driver.join().unwrap();
        assert_eq!((report(round).still_in(), drain.cancel_token().reason()), (1, Some(CancelReason::Shutdown)));
        assert_done(&drain, 1);
        drop(stuck);
    });
}

#[test]
fn a_driver_that_is_dropped_ends_the_closing_whoever_leaves_meanwhile() {
    explore(|| {
        let drain = drain();
        let leaver = spawn_drop(drain.try_acquire().unwrap());
        let (round, driver) = begin(&drain, Duration::MAX);
        drop(driver);
        let report = report(round);
        assert!(report.finished() + report.cancelled() + report.still_in() <= 1);
        leaver.join().unwrap();
        assert_done(&drain, 0);
    });
}

#[test]
fn who_is_stuck_in_one_round_is_counted_in_the_next() {
    explore(|| {
        let drain = drain();
        let leaver = spawn_drop(drain.try_acquire().unwrap());
        let first = close(&drain, Duration::ZERO);
        assert!(drain.reopen());
        let caller = thread::spawn({
            let drain = drain.clone();
            move || drop(drain.try_acquire())
        });
        let second = close(&drain, Duration::MAX);
        assert!(second.is_clean());
        assert!(second.finished() <= first.still_in() + 1);
        leaver.join().unwrap();
        caller.join().unwrap();
        assert_done(&drain, 0);
    });
}
