//! Cancelling against cancelling, against waiting, and against the birth and death of children.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use futures::FutureExt;
use loom::thread;

use super::{Cancel, CancelReason};
use crate::loom::{block_on, explore};
use crate::policy::Policy;

#[test]
fn of_two_reasons_one_wins_and_both_hear_which() {
    explore(|| {
        let cancel = Cancel::new();
        let other = thread::spawn({
            let cancel = cancel.clone();
            move || (cancel.cancel_with(CancelReason::Shutdown), cancel.reason())
        });
        let mine = (cancel.cancel_with(CancelReason::ClientGone), cancel.reason());
        let theirs = other.join().unwrap();
        assert!(mine.0 ^ theirs.0);
        assert_eq!(mine.1, theirs.1);
        assert_eq!(mine.1, Some(if mine.0 { CancelReason::ClientGone } else { CancelReason::Shutdown }));
    });
}

#[test]
fn a_waiter_of_a_child_hears_its_parent_and_the_reason_does_not_change() {
    explore(|| {
        let parent = Cancel::new();
        let child = parent.child();
        let other = thread::spawn(move || parent.cancel_with(CancelReason::Shutdown));
        let before = child.reason();
        let told = block_on(child.cancelled());
        assert_eq!(told, CancelReason::Shutdown);
        assert!(before.is_none_or(|before| before == told));
        assert!(other.join().unwrap());
    });
}

#[test]
fn a_child_that_is_born_meanwhile_is_cancelled_too() {
    explore(|| {
        let parent = Cancel::new();
        let other = thread::spawn({
            let parent = parent.clone();
            move || parent.cancel_with(CancelReason::Shutdown)
        });
        let grandchild = parent.child().child();
        other.join().unwrap();
        assert_eq!(grandchild.reason(), Some(CancelReason::Shutdown));
        assert_eq!(grandchild.cancelled().now_or_never(), Some(CancelReason::Shutdown));
    });
}

#[test]
fn a_grandchild_has_the_reason_of_its_parent_whoever_is_first() {
    explore(|| {
        let top = Cancel::new();
        let middle = top.child();
        let bottom = middle.child();
        let other = thread::spawn(move || {
            top.cancel_with(CancelReason::Shutdown);
        });
        let first = middle.cancel_with(CancelReason::Superseded);
        // Whoever was first: when this returned, all of it was done.
        let told = bottom.reason();
        assert_eq!(told, Some(if first { CancelReason::Superseded } else { CancelReason::Shutdown }));
        assert_eq!(told, middle.reason());
        other.join().unwrap();
        assert_eq!(told, bottom.reason());
    });
}

#[test]
fn the_death_of_a_parent_in_the_middle_cuts_nobody_off() {
    explore(|| {
        let top = Cancel::new();
        let middle = top.child();
        let bottom = middle.child();
        let other = thread::spawn(move || drop(middle));
        drop(top.child());
        top.cancel();
        assert!(bottom.is_cancelled());
        other.join().unwrap();
    });
}

#[test]
fn a_call_completes_or_is_cancelled_and_its_error_has_the_reason() {
    explore(|| {
        let cancel = Cancel::new();
        let policy = Policy::named("model").build().unwrap();
        let polls = Arc::new(AtomicU32::new(0));
        let other = thread::spawn({
            let cancel = cancel.clone();
            move || cancel.cancel_with(CancelReason::Superseded)
        });
        let call = policy.call().cancel_on(&cancel).run(|| {
            std::future::poll_fn(|cx| match polls.fetch_add(1, Relaxed) {
                0 => {
                    cx.waker().wake_by_ref();
                    std::task::Poll::Pending
                }
                _ => std::task::Poll::Ready(Ok::<_, ()>(())),
            })
        });
        match block_on(call) {
            Ok(()) => assert_eq!(polls.load(Relaxed), 2),
            Err(error) => assert_eq!(error.cancel_reason(), Some(&CancelReason::Superseded)),
        }
        assert!(other.join().unwrap());
    });
}
