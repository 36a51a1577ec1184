//! [`Pipeline`]: the steps of a policy with what is known of them before any call comes.

use std::sync::Arc;
use std::time::Duration;

use super::{Kind, Step};
use crate::early::Listeners;
use crate::error::Name;
use crate::gate::Needs;
use crate::least_time::LeastTime;
use crate::said::Said;

/// The steps that a call walks through, outermost first, and their outline.
#[derive(Clone, Copy, Debug)]
pub struct Pipeline<'a> {
    pub(crate) steps: &'a [Step],
    pub(crate) outline: &'a Outline,
}

/// Something that holds a pipeline: a policy, a reference to one, or the small policy of a one-shot future.
pub trait Steps: sealed::Sealed {
    #[doc(hidden)]
    fn pipeline(&self) -> Pipeline<'_>;
}

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// What is known of the steps as a whole.
#[derive(Debug)]
pub struct Outline {
    /// There are no steps, and nothing is attached to all calls: a call is its operation.
    pub(crate) bare: bool,
    /// The most that any step needs of the clock.
    pub(crate) needs: Needs,
    /// Whether one of the steps retries.
    pub(crate) retries: bool,
    /// A bit for each step that records operations that went well: the lowest for the innermost step. Policies with more
    /// than [`Outline::MOST`] steps don't use it.
    pub(crate) success_mask: u64,
    /// Keys and cancellation sources attached to each call.
    pub(crate) said: Option<Arc<Said>>,
    /// The listeners for early ends.
    pub(crate) listeners: Option<Listeners>,
    /// How much time an operation needs.
    pub(crate) least: LeastTime,
    /// How much time the retries want an attempt to have, in nanoseconds, with the grain of a timer; 0 by default.
    pub(crate) retry_least: u64,
    /// The policy's name, for its errors; none if it is empty.
    pub(crate) name: Option<Arc<Name>>,
}

impl Outline {
    /// How many steps the mask has bits for.
    pub(crate) const MOST: usize = 64;

    /// The outline of no steps.
    pub(crate) const fn none() -> Self {
        Self {
            bare: true,
            needs: Needs::Nothing,
            retries: false,
            success_mask: 0,
            said: None,
            listeners: None,
            least: LeastTime::none(),
            retry_least: 0,
            name: None,
        }
    }

    pub(crate) fn of(steps: &[Step], said: Option<Arc<Said>>, listeners: Option<Listeners>) -> Self {
        let told = if listeners.is_some() { Needs::Now } else { Needs::Nothing };
        let bit = |(place, step): (usize, &Step)| u64::from(step.records_success()) << place;
        Self {
            bare: steps.is_empty() && said.is_none() && listeners.is_none(),
            needs: steps.iter().map(Step::needs).fold(told, Needs::max),
            retries: steps.iter().any(|step| matches!(step.0, Kind::Retry(_))),
            success_mask: steps.iter().rev().take(Self::MOST).enumerate().map(bit).sum(),
            said,
            listeners,
            least: LeastTime::none(),
            retry_least: steps.iter().map(Step::retry_least).max().unwrap_or(0),
            name: None,
        }
    }

    /// Adds the policy's name and the time that an operation needs: learned by default, or `min_attempt`.
    pub(crate) fn of_policy(self, name: &Name, steps: &[Step], min_attempt: Option<Duration>) -> Self {
        let name = (!name.as_str().is_empty()).then(|| Arc::new(name.clone()));
        Self { least: LeastTime::new(steps.iter().filter_map(Step::limit), min_attempt), name, ..self }
    }
}
