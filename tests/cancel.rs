//! `Cancel`: one reason, for all that is below, for all that wait.

mod support;

use std::future::{Future, pending};
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use proptest::prelude::*;
use resile::{Cancel, CancelReason, ErrorKind, FutureExt, Policy};
use support::hand::{Flag, catch_boom, nosy, poll_once};
use support::ms;
use support::script::Boom;
use tokio_util::sync::CancellationToken;

/// What a call under an empty policy is cancelled with.
async fn reason(call: impl Future<Output = Result<(), resile::Error<()>>>) -> Option<CancelReason> {
    let error = call.await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert!(error.is_cancelled() && !error.is_timeout() && !error.is_refused());
    error.cancel_reason().cloned()
}

#[test]
fn a_new_token_is_not_cancelled() {
    let cancel = Cancel::new();
    assert!(!cancel.is_cancelled());
    assert_eq!(cancel.reason(), None);
    assert_eq!(format!("{cancel:?}"), "Cancel { reason: None }");
}

#[test]
fn the_first_reason_wins() {
    let cancel = Cancel::new();
    assert!(cancel.cancel_with(CancelReason::ClientGone));
    assert!(!cancel.cancel_with(CancelReason::Shutdown));
    assert!(!cancel.cancel());
    assert_eq!(cancel.clone().reason(), Some(CancelReason::ClientGone));
}

#[test]
fn a_child_has_the_reason_of_its_parent_also_when_it_is_born_late() {
    let parent = Cancel::new();
    let early = parent.child().child();
    assert!(parent.cancel_with("moved"));
    let late = parent.child().child();
    for child in [early, late] {
        assert_eq!(child.reason(), Some(CancelReason::Custom("moved".into())));
        assert!(!child.cancel());
        assert!(child.token().is_cancelled());
    }
}

#[test]
fn a_child_can_be_cancelled_alone_and_keeps_its_reason() {
    let parent = Cancel::new();
    let (child, sibling) = (parent.child(), parent.child());
    let grandchild = child.child();
    assert!(child.cancel_with(CancelReason::Superseded));
    assert!(!parent.is_cancelled() && !sibling.is_cancelled());
    assert!(parent.cancel_with(CancelReason::Shutdown));
    assert_eq!(child.reason(), Some(CancelReason::Superseded));
    assert_eq!(grandchild.reason(), Some(CancelReason::Superseded));
    assert_eq!(sibling.reason(), Some(CancelReason::Shutdown));
}

#[test]
fn dropping_a_token_cancels_nothing_and_cuts_no_child_off() {
    let top = Cancel::new();
    let middle = top.child();
    let bottom = middle.child();
    drop(middle);
    assert!(!bottom.is_cancelled());
    top.cancel();
    assert!(bottom.is_cancelled());
}

#[test]
fn a_long_line_of_children_is_cancelled_and_dropped_without_recursion() {
    let top = Cancel::new();
    let mut last = top.child();
    for _ in 0..100_000 {
        last = last.child();
    }
    top.cancel_with(CancelReason::Shutdown);
    assert_eq!(last.reason(), Some(CancelReason::Shutdown));
    drop(top);
    drop(last);
}

#[test]
fn all_who_wait_are_woken_once_everything_is_marked() {
    let parent = Cancel::new();
    let child = parent.child();
    let (mut at_parent, mut at_child) = (pin!(parent.cancelled()), pin!(child.cancelled()));
    let (one, other) = (Flag::default(), Flag::default());
    assert!(one.poll(at_parent.as_mut()).is_pending());
    assert!(other.poll(at_child.as_mut()).is_pending());
    assert!(!one.woken() && !other.woken());
    parent.cancel_with(CancelReason::ClientGone);
    assert!(one.woken() && other.woken());
    assert!(one.poll(at_parent).is_ready());
    assert_eq!(other.poll(at_child), std::task::Poll::Ready(CancelReason::ClientGone));
}

#[test]
fn a_waiter_outlives_every_handle_and_can_be_dropped_at_any_time() {
    let cancel = Cancel::new();
    let mut kept = Box::pin(cancel.child().cancelled());
    assert!(poll_once(kept.as_mut()).is_pending());
    for polls in 0..3 {
        let mut dropped = Box::pin(cancel.cancelled());
        for _ in 0..polls {
            assert!(poll_once(dropped.as_mut()).is_pending());
        }
    }
    cancel.cancel();
    assert!(poll_once(kept.as_mut()).is_ready());
}

#[test]
fn a_view_cancels_nothing_but_itself() {
    let cancel = Cancel::new();
    let (token, other) = (cancel.token(), cancel.token());
    token.cancel();
    assert!(!cancel.is_cancelled() && !other.is_cancelled());
    assert!(poll_once(pin!(cancel.cancelled())).is_pending());
    cancel.cancel();
    assert!(other.is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_call_ends_as_cancelled_with_the_reason() {
    let policy = Policy::named("users").timeout(Duration::from_secs(1)).build().unwrap();
    let cancel = Cancel::new();
    let call = policy.call().cancel_on(&cancel).run(std::future::pending);
    let (told, _) = tokio::join!(reason(call), async { cancel.cancel_with(CancelReason::ClientGone) });
    assert_eq!(told, Some(CancelReason::ClientGone));

    // And before it has begun.
    let call = policy.call().cancel_on(&cancel.child()).run(std::future::pending);
    assert_eq!(reason(call).await, Some(CancelReason::ClientGone));
}

#[tokio::test(start_paused = true)]
async fn a_token_of_tokio_gives_no_reason() {
    let policy = Policy::named("users").build().unwrap();
    let token = CancellationToken::new();
    let call = policy.call().cancel_on(&token).run(std::future::pending);
    let (told, ()) = tokio::join!(reason(call), async { token.cancel() });
    assert_eq!(told, Some(CancelReason::Unspecified));
    assert_eq!(reason(std::future::pending().cancelled_by(&token)).await, Some(CancelReason::Unspecified));
}

#[tokio::test(start_paused = true)]
async fn of_several_tokens_the_one_that_was_cancelled_tells_the_reason() {
    let policy = Policy::named("users").build().unwrap();
    let (token, one, two) = (CancellationToken::new(), Cancel::new(), Cancel::new());
    let call = policy.call().cancel_on(&token).cancel_on(&one).cancel_on(&two).run(std::future::pending);
    let (told, _) = tokio::join!(reason(call), async { two.cancel_with("second") });
    assert_eq!(told, Some("second".into()));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_ready_when_it_is_cancelled_succeeds() {
    let policy = Policy::named("users").build().unwrap();
    let cancel = Cancel::new();
    let answer = policy
        .call()
        .cancel_on(&cancel)
        .run(async || {
            // From inside of the operation: it goes on to its next await.
            cancel.cancel();
            Ok::<_, ()>(42)
        })
        .await;
    assert_eq!(answer.unwrap(), 42);

    let cancel = Cancel::new();
    let call = policy.call().cancel_on(&cancel).run(async || {
        cancel.cancel_with("from inside");
        tokio::time::sleep(ms(1)).await;
        Ok::<_, ()>(())
    });
    assert_eq!(reason(call).await, Some("from inside".into()));
}

#[tokio::test(start_paused = true)]
async fn cancelling_after_the_call_has_finished_changes_nothing() {
    let policy = Policy::named("users").build().unwrap();
    let cancel = Cancel::new();
    let answer = policy.call().cancel_on(&cancel).run(async || Ok::<_, ()>(42)).await;
    assert!(cancel.cancel(), "recorded all the same");
    assert_eq!(answer.unwrap(), 42);
}

#[test]
fn reasons_say_what_they_are() {
    let reasons = [
        CancelReason::ClientGone,
        CancelReason::Deadline,
        CancelReason::Shutdown,
        CancelReason::Superseded,
        CancelReason::SiblingFailed,
        CancelReason::from(String::from("moved")),
        CancelReason::default(),
    ];
    assert_eq!(
        reasons.map(|reason| reason.to_string()).join(", "),
        "the client has gone, a deadline passed, shutdown, superseded, a sibling failed, moved, no reason given"
    );
}

/// What can be done to a family of tokens: numbers are taken modulo how many there are.
#[derive(Clone, Debug)]
enum Act {
    Child(usize),
    Cancel(usize, u8),
    Drop(usize),
}

/// A family in which each knows its parent, and nothing is clever.
#[derive(Default)]
struct Naive(Vec<(Option<usize>, Option<u8>)>);

impl Naive {
    fn cancel(&mut self, at: usize, reason: u8) -> bool {
        if self.0[at].1.is_some() {
            return false;
        }
        self.0[at].1 = Some(reason);
        for child in 0..self.0.len() {
            if self.0[child].0 == Some(at) {
                self.cancel(child, reason);
            }
        }
        true
    }

    fn child(&mut self, of: usize) {
        self.0.push((Some(of), self.0[of].1));
    }
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        4 => any::<usize>().prop_map(Act::Child),
        2 => (any::<usize>(), any::<u8>()).prop_map(|(at, reason)| Act::Cancel(at, reason)),
        3 => any::<usize>().prop_map(Act::Drop),
    ];
    proptest::collection::vec(act, 0..60)
}

proptest! {
    #[test]
    fn a_family_behaves_like_a_list_of_its_members(acts in acts()) {
        let mut naive = Naive(vec![(None, None)]);
        let mut family = vec![Some(Cancel::new())];
        for act in acts {
            let living: Vec<usize> = (0..family.len()).filter(|at| family[*at].is_some()).collect();
            if living.is_empty() {
                break;
            }
            let one = |at: usize| living[at % living.len()];
            match act {
                Act::Child(at) => {
                    naive.child(one(at));
                    let child = family[one(at)].as_ref().unwrap().child();
                    family.push(Some(child));
                }
                Act::Cancel(at, reason) => {
                    let first = family[one(at)].as_ref().unwrap().cancel_with(reason.to_string());
                    prop_assert_eq!(first, naive.cancel(one(at), reason));
                }
                Act::Drop(at) => family[one(at)] = None,
            }
            for (token, (_, reason)) in family.iter().zip(&naive.0) {
                if let Some(token) = token {
                    prop_assert_eq!(token.reason(), reason.map(|reason| reason.to_string().into()));
                    prop_assert_eq!(token.is_cancelled(), token.token().is_cancelled());
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// Several sources

/// What a call, its listener and its cleanup are told, when `cancel` acts while the operation is pending.
async fn told_of(sources: &[&dyn Fn() -> Cancel], cancel: impl FnOnce()) -> (Option<CancelReason>, Vec<String>) {
    let log = Arc::new(Mutex::new(Vec::new()));
    let told = log.clone();
    let policy = Policy::named("p")
        .on_early_end(move |end| told.lock().unwrap().push(format!("{:?}", end.why())))
        .build()
        .unwrap();
    let cleaned = log.clone();
    let call = sources.iter().fold(policy.call(), |call, source| call.cancel_on(&source()));
    let call = call.cleanup(move |(), cut| {
        cleaned.lock().unwrap().push(format!("{:?}", cut.why()));
        async {}
    });
    let mut run = pin!(call.run(|| ((), pending::<Result<(), ()>>())));
    assert!(poll_once(run.as_mut()).is_pending());
    cancel();
    let error = run.await.unwrap_err();
    policy.tasks().idle().await;
    let log = log.lock().unwrap().clone();
    (error.cancel_reason().cloned(), log)
}

#[tokio::test(start_paused = true)]
async fn of_several_sources_the_one_that_was_cancelled_first_gives_the_reason_to_all() {
    for b_first in [true, false] {
        let (a, b) = (Cancel::new(), Cancel::new());
        let (one, other) = if b_first { (b.clone(), a.clone()) } else { (a.clone(), b.clone()) };
        let (error, log) = told_of(&[&|| a.clone(), &|| b.clone()], move || {
            one.cancel_with("first");
            other.cancel_with("second");
        })
        .await;
        assert_eq!(error, Some("first".into()), "b first: {b_first}");
        assert_eq!(log.len(), 2);
        assert!(log.iter().all(|line| line.contains("first")), "{log:?}");
    }
}

/// A listener or the operation's drop may cancel another source while the call ends.
#[tokio::test(start_paused = true)]
async fn a_reason_does_not_change_while_the_call_ends() {
    struct CancelsOnDrop(Cancel);
    impl Drop for CancelsOnDrop {
        fn drop(&mut self) {
            self.0.cancel_with("from the drop");
        }
    }
    let (a, b) = (Cancel::new(), Cancel::new());
    let told = Arc::new(Mutex::new(String::new()));
    let (seen, by_listener) = (told.clone(), a.clone());
    let policy = Policy::named("p").on_early_end(move |end| {
        by_listener.cancel_with("from the listener");
        *seen.lock().unwrap() = format!("{:?}", end.why());
    });
    let policy = policy.build().unwrap();
    let mut run = pin!(policy.call().cancel_on(&a).cancel_on(&b).run(|| {
        let held = CancelsOnDrop(a.clone());
        async move {
            let _held = held;
            pending::<Result<(), ()>>().await
        }
    }));
    assert!(poll_once(run.as_mut()).is_pending());
    b.cancel_with("b");
    let error = run.await.unwrap_err();
    assert_eq!(error.cancel_reason(), Some(&"b".into()));
    assert!(told.lock().unwrap().contains('b') && !told.lock().unwrap().contains("from"), "{told:?}");
}

/// tokio-util's token has no number of its own: it counts from when it is noticed.
#[tokio::test(start_paused = true)]
async fn a_token_that_is_noticed_first_stays_the_first() {
    let (token, cancel) = (CancellationToken::new(), Cancel::new());
    let request = resile::context::Context::new().cancel(&cancel).cancel(&token);
    token.cancel();
    assert_eq!(request.cancel_reason(), Some(CancelReason::Unspecified));
    cancel.cancel_with(CancelReason::Shutdown);
    assert_eq!(request.clone().cancel_reason(), Some(CancelReason::Unspecified));

    let (token, cancel) = (CancellationToken::new(), Cancel::new());
    let policy = Policy::named("p").build().unwrap();
    cancel.cancel_with(CancelReason::Shutdown);
    token.cancel();
    let call = policy.call().cancel_on(&token).cancel_on(&cancel).run(|| async { Ok::<(), ()>(()) });
    assert_eq!(reason(call).await, Some(CancelReason::Shutdown));
}

#[test]
fn a_waker_that_panics_cuts_nobody_off() {
    struct Bomb;
    impl Wake for Bomb {
        fn wake(self: Arc<Self>) {
            std::panic::panic_any(Boom);
        }
    }
    let parent = Cancel::new();
    let child = parent.child();
    let bomb = Waker::from(Arc::new(Bomb));
    let mut before = pin!(parent.cancelled());
    assert!(before.as_mut().poll(&mut std::task::Context::from_waker(&bomb)).is_pending());
    let (same, below) = (Flag::default(), Flag::default());
    let (mut at_same, mut at_child) = (pin!(parent.cancelled()), pin!(child.cancelled()));
    assert!(same.poll(at_same.as_mut()).is_pending() && below.poll(at_child.as_mut()).is_pending());
    assert!(catch_boom(|| parent.cancel_with(CancelReason::Shutdown)).is_none());
    assert!(same.woken() && below.woken());
    assert_eq!(child.reason(), Some(CancelReason::Shutdown));
}

#[test]
fn a_waiter_that_leaves_takes_its_waker_along() {
    let cancel = Cancel::new();
    let flag = Flag::default();
    for _ in 0..100 {
        let mut wait = pin!(cancel.cancelled());
        assert!(flag.poll(wait.as_mut()).is_pending());
        assert!(flag.poll(wait.as_mut()).is_pending());
    }
    cancel.cancel();
    assert!(!flag.woken());
}

/// A deadlock if any of it happened under the token's lock.
#[test]
fn a_waker_may_use_the_token_when_it_is_woken_and_when_it_is_dropped() {
    let token = Cancel::new();
    let uses = |token: &Cancel| {
        let token = token.clone();
        nosy(move || drop(token.child()))
    };
    let (mut first, mut second) = (Box::pin(token.cancelled()), Box::pin(token.cancelled()));
    for _ in 0..2 {
        // The waker from before is replaced.
        assert!(first.as_mut().poll(&mut Context::from_waker(&uses(&token))).is_pending());
        assert!(second.as_mut().poll(&mut Context::from_waker(&uses(&token))).is_pending());
    }
    drop(first);
    token.cancel();
    assert!(second.as_mut().poll(&mut Context::from_waker(&uses(&token))).is_ready());
}

#[test]
fn handles_of_one_token_are_equal_and_no_others() {
    let token = Cancel::new();
    assert_eq!(token, token.clone());
    assert_ne!(token, Cancel::new());
    assert_ne!(token, token.child());
}
