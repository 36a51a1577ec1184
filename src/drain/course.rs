//! The machine of one closing: when its grace and its patience end, and what became of those that were in flight.

use std::time::Duration;

use crate::internal::time::Moment;

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing before that moment, unless the last one leaves or the grace is cut short.
    Wait(Moment),
    /// The grace is over: tell the rest to stop.
    Cancel,
    /// All are out, or those that are not have had their time.
    End,
}

/// A closing on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Course {
    began: Moment,
    grace_ends: Moment,
    in_flight: u64,
    told: Option<Told>,
}

/// Those that were told to stop.
#[derive(Clone, Copy, Debug)]
struct Told {
    in_flight: u64,
    patience_ends: Moment,
}

/// What became of those that were in flight when the closing began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) finished: u64,
    pub(crate) cancelled: u64,
    pub(crate) stuck: u64,
    pub(crate) took: Duration,
}

impl Course {
    pub(crate) const fn new(began: Moment, grace_ends: Moment, in_flight: u64) -> Self {
        Self { began, grace_ends, in_flight, told: None }
    }

    /// Somebody else closes too: the earlier end of the grace holds. Whether that changed anything.
    pub(crate) fn hurry(&mut self, grace_ends: Moment) -> bool {
        let sooner = self.told.is_none() && grace_ends < self.grace_ends;
        if sooner {
            self.grace_ends = grace_ends;
        }
        sooner
    }

    /// Being empty wins over a moment that has come.
    pub(crate) fn next(&self, now: Moment, in_flight: u64) -> Next {
        if in_flight == 0 {
            return Next::End;
        }
        match self.told {
            None if now < self.grace_ends => Next::Wait(self.grace_ends),
            None => Next::Cancel,
            Some(told) if now < told.patience_ends => Next::Wait(told.patience_ends),
            Some(_) => Next::End,
        }
    }

    pub(crate) fn cancel(&mut self, in_flight: u64, patience_ends: Moment) {
        self.told = Some(Told { in_flight, patience_ends });
    }

    /// Whether the grace was over, so that those in flight were told to stop.
    pub(crate) const fn has_told(&self) -> bool {
        self.told.is_some()
    }

    /// Nobody enters a closed drain, so those that are missing since the last step are those that have left.
    pub(crate) fn end(&self, now: Moment, in_flight: u64) -> Account {
        let told = self.told.map_or(in_flight, |told| told.in_flight);
        Account {
            finished: self.in_flight - told,
            cancelled: told - in_flight,
            stuck: in_flight,
            took: now.since(self.began),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(seconds: u64) -> Moment {
        Moment::at(seconds * 1_000_000_000)
    }

    #[test]
    fn the_grace_comes_first_and_the_patience_after_it() {
        let mut course = Course::new(at(0), at(10), 3);
        assert_eq!(course.next(at(0), 3), Next::Wait(at(10)));
        assert_eq!(course.next(at(10), 2), Next::Cancel);
        course.cancel(2, at(15));
        assert_eq!(course.next(at(10), 2), Next::Wait(at(15)));
        assert_eq!(course.next(at(15), 1), Next::End);
        let took = Duration::from_secs(15);
        assert_eq!(course.end(at(15), 1), Account { finished: 1, cancelled: 1, stuck: 1, took });
    }

    #[test]
    fn an_empty_house_is_done_at_once_even_when_its_time_is_over_too() {
        let mut course = Course::new(at(0), at(0), 1);
        assert_eq!(course.next(at(5), 0), Next::End);
        course.cancel(1, at(0));
        assert_eq!(course.next(at(5), 0), Next::End);
    }

    #[test]
    fn the_earlier_end_of_the_grace_holds_and_none_is_moved_once_it_is_over() {
        let mut course = Course::new(at(0), at(10), 1);
        assert!(!course.hurry(at(20)));
        assert!(course.hurry(at(5)));
        assert_eq!(course.next(at(5), 1), Next::Cancel);
        course.cancel(1, at(8));
        assert!(!course.hurry(at(1)));
        assert_eq!(course.next(at(6), 1), Next::Wait(at(8)));
    }

    #[test]
    fn a_clock_that_goes_back_only_makes_it_wait() {
        let course = Course::new(at(10), at(20), 1);
        assert_eq!(course.next(at(3), 1), Next::Wait(at(20)));
        assert_eq!(course.end(at(3), 1).took, Duration::ZERO);
    }
}
