//! `FutureExt::on_cancel`: a word from a future that is dropped half-way, and none from any other.

mod support;

use std::cell::RefCell;
use std::future::{Future, pending, ready};
use std::rc::Rc;
use std::time::Duration;

use resile::{Cancel, CutShort, FutureExt, Policy};
use support::hand::{Clock, catch_boom, poll_once};
use support::ms;
use support::script::Boom;

/// What was told, in order.
#[derive(Clone, Debug, Default)]
struct Told(Rc<RefCell<Vec<(bool, Duration)>>>);

impl Told {
    fn tell(&self) -> impl FnOnce(CutShort) + use<> {
        let told = self.0.clone();
        move |cut| told.borrow_mut().push((cut.was_polled(), cut.elapsed()))
    }

    fn get(&self) -> Vec<(bool, Duration)> {
        self.0.borrow().clone()
    }
}

/// Panics when it is dropped.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        std::panic::panic_any(Boom);
    }
}

#[test]
fn a_future_that_is_dropped_half_way_tells_how_long_it_ran() {
    let clock = Clock::paused();
    let _entered = clock.enter();
    let told = Told::default();
    let mut future = Box::pin(pending::<()>().on_cancel(told.tell()));
    clock.advance(ms(5));
    assert!(poll_once(future.as_mut()).is_pending());
    clock.advance(ms(7));
    assert!(poll_once(future.as_mut()).is_pending());
    clock.advance(ms(2));
    assert_eq!(told.get(), []);
    drop(future);
    assert_eq!(told.get(), [(true, ms(9))]);
}

#[test]
fn a_future_that_was_never_polled_tells_so() {
    let told = Told::default();
    drop(pending::<()>().on_cancel(told.tell()));
    assert_eq!(told.get(), [(false, Duration::ZERO)]);
}

#[test]
fn a_future_that_is_ready_tells_nothing() {
    let told = Told::default();
    let mut future = Box::pin(ready(7).on_cancel(told.tell()));
    assert!(poll_once(future.as_mut()).is_ready());
    drop(future);
    assert_eq!(told.get(), []);
}

#[test]
fn a_panic_is_no_cancellation() {
    let told = Told::default();
    let future = async { std::panic::panic_any(Boom) };
    let mut future: std::pin::Pin<Box<dyn Future<Output = ()>>> = Box::pin(future.on_cancel(told.tell()));
    assert!(catch_boom(|| poll_once(future.as_mut())).is_none());
    drop(future);
    assert_eq!(told.get(), []);
}

#[test]
fn it_tells_after_the_future_is_gone_also_when_its_drop_panics() {
    let told = Told::default();
    let bomb = Bomb;
    let mut future = Box::pin(
        async move {
            let _bomb = bomb;
            pending::<()>().await;
        }
        .on_cancel(told.tell()),
    );
    assert!(poll_once(future.as_mut()).is_pending());
    assert!(catch_boom(move || drop(future)).is_none());
    assert_eq!(told.get().len(), 1);
}

#[test]
fn a_panic_of_the_teller_comes_out_of_the_drop() {
    let future = pending::<()>().on_cancel(|_| std::panic::panic_any(Boom));
    assert!(catch_boom(move || drop(future)).is_none());
}

#[tokio::test(start_paused = true)]
async fn it_composes_with_limits_and_policies() {
    let told = Told::default();
    let hang = || pending::<Result<(), ()>>().on_cancel(told.tell());
    assert!(hang().within(ms(10)).await.is_err());

    let policy = Policy::named("p").timeout(ms(20)).build().unwrap();
    assert!(policy.run(hang).await.is_err());

    let cancel = Cancel::new();
    let (cut, _) = tokio::join!(hang().cancelled_by(&cancel), async { cancel.cancel() });
    assert!(cut.unwrap_err().is_cancelled());
    assert_eq!(told.get(), [(true, ms(10)), (true, ms(20)), (true, ms(0))]);

    // Around the whole, it tells of the caller's drop only.
    let whole = Told::default();
    assert!(hang().within(ms(10)).on_cancel(whole.tell()).await.is_err());
    assert_eq!(whole.get(), []);
}
