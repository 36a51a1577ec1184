//! Models of the retry budget: what is taken out is never more than what was paid in.

use std::time::Duration;

use loom::thread::{self, JoinHandle};

use super::RetryBudget;
use crate::internal::time::Moment;
use crate::loom::explore;

/// Each call that went well pays for one retry.
fn ratio(deposits: u32) -> RetryBudget {
    let budget = RetryBudget::ratio(1.0).reserve_per_second(0).expiry(Duration::from_secs(10)).build().unwrap();
    (0..deposits).for_each(|_| deposit(&budget));
    budget
}

/// Each call in flight allows one retry.
fn share(calls: u32) -> RetryBudget {
    let budget = RetryBudget::share(1.0).floor(0).build().unwrap();
    (0..calls).for_each(|_| budget.enter());
    budget
}

fn deposit(budget: &RetryBudget) {
    budget.deposit(Moment::now);
}

fn take(budget: &RetryBudget) -> bool {
    budget.take(Moment::now())
}

/// Another thread's part in a model.
fn spawn<T: 'static>(budget: &RetryBudget, part: impl FnOnce(&RetryBudget) -> T + 'static) -> JoinHandle<T> {
    let budget = budget.clone();
    thread::spawn(move || part(&budget))
}

/// B1
#[test]
fn of_two_who_want_the_one_retry_that_is_paid_for_one_gets_it() {
    for budget in [ratio, share] {
        explore(move || {
            let budget = budget(1);
            let other = spawn(&budget, take);
            let own = take(&budget);
            assert!(own ^ other.join().unwrap());
            assert_eq!(budget.available(), 0);
        });
    }
}

/// B1
#[test]
fn two_who_race_a_deposit_get_no_more_than_it_pays_for() {
    explore(|| {
        let budget = ratio(0);
        let takers = [(); 2].map(|()| spawn(&budget, take));
        deposit(&budget);
        let taken = takers.into_iter().filter_map(|taker| taker.join().unwrap().then_some(())).count() as u64;
        assert!(taken <= 1);
        assert_eq!(budget.available(), 1 - taken);
    });
}

#[test]
fn two_deposits_at_once_pay_for_two() {
    explore(|| {
        let budget = ratio(0);
        let other = spawn(&budget, deposit);
        deposit(&budget);
        other.join().unwrap();
        assert_eq!(budget.available(), 2);
    });
}

/// B5
#[test]
fn a_refund_during_another_withdrawal_is_worth_one() {
    for budget in [ratio, share] {
        explore(move || {
            let budget = budget(2);
            assert!(take(&budget) && take(&budget));
            let other = spawn(&budget, take);
            budget.settle(false);
            let again = other.join().unwrap();
            assert_eq!(budget.available(), u64::from(!again));
        });
    }
}

/// A share shrinks with the calls in flight, but takes back nothing that it gave.
#[test]
fn a_withdrawal_that_races_the_end_of_a_call_is_settled_to_nothing() {
    explore(|| {
        let budget = share(2);
        assert!(take(&budget));
        let other = spawn(&budget, take);
        budget.leave();
        let second = other.join().unwrap();
        assert_eq!(budget.available(), 0);
        budget.settle(true);
        assert_eq!(budget.available(), u64::from(!second));
        if second {
            budget.settle(false);
        }
        assert_eq!(budget.available(), 1);
        budget.leave();
        assert_eq!(budget.available(), 0);
    });
}

#[test]
fn two_who_begin_and_end_at_once_leave_nothing_in_flight() {
    explore(|| {
        let budget = share(1);
        let other = spawn(&budget, |budget| {
            budget.enter();
            if take(budget) {
                budget.settle(true);
            }
            budget.leave();
        });
        budget.leave();
        other.join().unwrap();
        assert_eq!(budget.available(), 0);
        assert!(!take(&budget));
        budget.enter();
        assert_eq!(budget.available(), 1);
    });
}
