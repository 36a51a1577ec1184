//! Keys and cancellation sources attached to a call: by its caller, its policy, and the context of its task.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Waker};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::call::Key;
use crate::cancel::{self, Cancel, CancelReason, Record};

/// What few calls have, kept out of the way of the many: keys, and what may cancel them.
///
/// Shared while nobody adds to it, so that a call which only inherits allocates nothing.
#[derive(Clone, Default)]
pub struct Said {
    keys: Vec<(&'static str, Key)>,
    cancels: Vec<Source>,
}

impl Said {
    pub(crate) fn keys(&self) -> &[(&'static str, Key)] {
        &self.keys
    }

    pub(crate) fn key(&self, name: &str) -> Option<&Key> {
        self.keys.iter().find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    pub(crate) fn set_key(&mut self, name: &'static str, value: Key) {
        self.keys.retain(|(key, _)| *key != name);
        self.keys.push((name, value));
    }

    pub(crate) fn watch(&mut self, source: &impl CancelSource) {
        self.cancels.push(source.source());
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancels.iter().any(Source::is_cancelled)
    }

    /// What it says but for what may cancel.
    pub(crate) fn only_keys(&self) -> Option<Arc<Self>> {
        (!self.keys.is_empty()).then(|| Arc::new(Self { keys: self.keys.clone(), cancels: Vec::new() }))
    }

    /// Whether anything of it may cancel.
    pub(crate) fn can_cancel(&self) -> bool {
        !self.cancels.is_empty()
    }

    /// The tokens of the crate's own among what may cancel, and the same without them.
    pub(crate) fn split_cancels(&self) -> (Vec<Cancel>, Self) {
        let mut rest = self.clone();
        let mut own = Vec::new();
        rest.cancels.retain(|source| match source {
            Source::Cancel(cancel) => {
                own.push(cancel.clone());
                false
            }
            Source::Token(..) | Source::Rounds(_) => true,
        });
        (own, rest)
    }

    /// The first cancellation of all sources.
    ///
    /// A source that was looked at before it was cancelled may have been cancelled before another one that was looked at
    /// after: so all are looked at again once one is found. What is found then is the first for good, since the next
    /// cancellation draws a larger number.
    pub(crate) fn first(&self) -> Option<Record> {
        let look = || self.cancels.iter().filter_map(Source::record).min_by_key(|record| record.number);
        look()?;
        look()
    }

    /// The reason of the first cancellation.
    pub(crate) fn cancel_reason(&self) -> Option<CancelReason> {
        self.first().map(|record| record.reason)
    }

    /// What was said by somebody further out: the own keys are the ones that count. What it has already is not added
    /// again, else it would double each time that it is put inside of itself.
    fn add(&mut self, outer: &Self) {
        for (name, value) in &outer.keys {
            if self.key(name).is_none() {
                self.keys.push((name, value.clone()));
            }
        }
        for source in &outer.cancels {
            if !self.cancels.contains(source) {
                self.cancels.push(source.clone());
            }
        }
    }
}

impl fmt::Debug for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Said").field("keys", &self.keys).field("cancels", &self.cancels).finish_non_exhaustive()
    }
}

/// Makes the extras unique so that they can be changed.
pub(crate) fn own(said: &mut Option<Arc<Said>>) -> &mut Said {
    Arc::make_mut(said.get_or_insert_default())
}

/// Adds what was said further out.
pub(crate) fn add(said: &mut Option<Arc<Said>>, outer: Option<&Arc<Said>>) {
    match (said, outer) {
        (_, None) => {}
        (Some(said), Some(outer)) if Arc::ptr_eq(said, outer) => {}
        (said @ None, Some(outer)) => *said = Some(outer.clone()),
        (Some(said), Some(outer)) => Arc::make_mut(said).add(outer),
    }
}

/// The waits for what may cancel a call, made when something was first pending.
#[derive(Default)]
pub(crate) struct Waits {
    waits: Vec<Wait>,
    /// Which every wait has.
    waker: Option<Waker>,
}

enum Wait {
    Cancel(cancel::Wait),
    Token(Pin<Box<WaitForCancellationFutureOwned>>),
}

impl Wait {
    /// Whether the token that is waited for was cancelled; it may be of a round that is over.
    fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancel(wait) if wait.token().is_cancelled())
    }
}

impl Waits {
    /// Whether something is cancelled; if not, the task is woken when it is.
    ///
    /// Asked again with the same waker, this is a look at each source: their waits keep the waker until they are over.
    pub(crate) fn is_over(&mut self, said: &Said, cx: &mut Context<'_>) -> bool {
        let is_new = self.waits.len() < said.cancels.len();
        if !is_new && self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            return said.is_cancelled() || self.waits.iter().any(Wait::is_cancelled);
        }
        self.waits.extend(said.cancels[self.waits.len()..].iter().map(Source::wait));
        self.waker = Some(cx.waker().clone());
        // A token's wait uses the cooperative budget up; a greedy operation must not hide a cancellation.
        self.waits.iter_mut().any(|wait| match wait {
            Wait::Cancel(wait) => wait.is_over(cx.waker()),
            Wait::Token(wait) => Pin::new(&mut tokio::task::unconstrained(wait.as_mut())).poll(cx).is_ready(),
        })
    }

    /// The first cancellation among the tokens that are waited for.
    pub(crate) fn first(&self) -> Option<Record> {
        let records = self.waits.iter().filter_map(|wait| match wait {
            Wait::Cancel(wait) => wait.token().record(),
            Wait::Token(_) => None,
        });
        records.min_by_key(|record| record.number)
    }
}

impl fmt::Debug for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Waits").field(&self.waits.len()).finish()
    }
}

/// Something that can cancel a call: a [`Cancel`], a [`Drain`](crate::Drain), or tokio-util's [`CancellationToken`], which
/// gives no reason.
///
/// Of several sources the one that was cancelled first gives the reason. A [`CancellationToken`] does not know when it was
/// cancelled, so it counts from when it is noticed.
pub trait CancelSource: sealed::Sealed {}

pub(crate) mod sealed {
    pub trait Sealed {
        fn source(&self) -> super::Source;
    }
}

/// Either token. Two are equal if they are handles of the same.
#[derive(Clone, Debug)]
pub enum Source {
    Cancel(Cancel),
    /// With the number of its cancellation, once somebody has noticed that: the token itself has none.
    Token(CancellationToken, Arc<AtomicU64>),
    /// Something with one token after another.
    Rounds(Arc<dyn Rounds>),
}

/// Something that can be cancelled again and again, each time by a new token.
pub trait Rounds: fmt::Debug + Send + Sync {
    /// Whether the current token is cancelled; quick if not.
    fn is_cancelled(&self) -> bool;
    /// The current token.
    fn current(&self) -> Cancel;
    /// What tells two of them apart.
    fn address(&self) -> usize;
}

impl PartialEq for Source {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Cancel(one), Self::Cancel(other)) => one == other,
            (Self::Token(one, _), Self::Token(other, _)) => one == other,
            (Self::Rounds(one), Self::Rounds(other)) => one.address() == other.address(),
            _ => false,
        }
    }
}

impl Source {
    fn is_cancelled(&self) -> bool {
        match self {
            Self::Cancel(cancel) => cancel.is_cancelled(),
            Self::Token(token, _) => token.is_cancelled(),
            Self::Rounds(rounds) => rounds.is_cancelled(),
        }
    }

    fn record(&self) -> Option<Record> {
        match self {
            Self::Cancel(cancel) => cancel.record(),
            Self::Rounds(rounds) => rounds.current().record(),
            Self::Token(token, number) => token.is_cancelled().then(|| {
                if number.load(Relaxed) == 0 {
                    cancel::numbered(|next| {
                        // Another thread may have noticed meanwhile; both are under the lock here.
                        if number.load(Relaxed) == 0 {
                            number.store(next, Relaxed);
                        }
                    });
                }
                Record { number: number.load(Relaxed), reason: CancelReason::Unspecified }
            }),
        }
    }

    fn wait(&self) -> Wait {
        match self {
            Self::Cancel(cancel) => Wait::Cancel(cancel::Wait::for_(cancel.clone())),
            Self::Rounds(rounds) => Wait::Cancel(cancel::Wait::for_(rounds.current())),
            Self::Token(token, _) => Wait::Token(Box::pin(token.clone().cancelled_owned())),
        }
    }
}

impl CancelSource for Cancel {}

impl sealed::Sealed for Cancel {
    fn source(&self) -> Source {
        Source::Cancel(self.clone())
    }
}

impl CancelSource for CancellationToken {}

impl sealed::Sealed for CancellationToken {
    fn source(&self) -> Source {
        Source::Token(self.clone(), Arc::default())
    }
}
