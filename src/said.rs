//! What is said about a call by whom it concerns: its caller, its policy, and the context of its task.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::call::Key;
use crate::cancel::{Cancel, CancelReason};

/// What few calls have, kept out of the way of the many: keys, and what may cancel them.
///
/// Shared while nobody adds to it, so that a call which only inherits allocates nothing.
#[derive(Default)]
pub struct Said {
    keys: Vec<(&'static str, Key)>,
    cancels: Vec<Source>,
    /// The waits for `cancels`, made when something was first pending.
    waits: Vec<Wait>,
}

type Wait = Pin<Box<WaitForCancellationFutureOwned>>;

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
        (!self.keys.is_empty()).then(|| Arc::new(Self { keys: self.keys.clone(), ..Self::default() }))
    }

    /// The reason of the first that is cancelled.
    pub(crate) fn cancel_reason(&self) -> Option<CancelReason> {
        self.cancels.iter().find_map(Source::reason)
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

    fn poll_cancelled(&mut self, cx: &mut Context<'_>) -> bool {
        let waited = self.waits.len();
        self.waits.extend(self.cancels[waited..].iter().map(|source| Box::pin(source.wait())));
        // Like the timer, outside of the cooperative budget: a greedy operation can't hide a cancellation.
        self.waits.iter_mut().any(|wait| Pin::new(&mut tokio::task::unconstrained(wait.as_mut())).poll(cx).is_ready())
    }
}

/// Waits are not shared.
impl Clone for Said {
    fn clone(&self) -> Self {
        Self { keys: self.keys.clone(), cancels: self.cancels.clone(), waits: Vec::new() }
    }
}

impl fmt::Debug for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Said").field("keys", &self.keys).field("cancels", &self.cancels).finish_non_exhaustive()
    }
}

/// The own copy, to say more in.
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

/// Whether something of it is cancelled; if not, the task is woken when it is.
pub(crate) fn poll_cancelled(said: &mut Arc<Said>, cx: &mut Context<'_>) -> bool {
    !said.cancels.is_empty() && Arc::make_mut(said).poll_cancelled(cx)
}

/// Something that can cancel a call: a [`Cancel`], or tokio-util's [`CancellationToken`], which gives no reason.
pub trait CancelSource: sealed::Sealed {}

mod sealed {
    pub trait Sealed {
        fn source(&self) -> super::Source;
    }
}

/// Either token. Two are equal if they are handles of the same.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    Cancel(Cancel),
    Token(CancellationToken),
}

impl Source {
    fn is_cancelled(&self) -> bool {
        match self {
            Self::Cancel(cancel) => cancel.is_cancelled(),
            Self::Token(token) => token.is_cancelled(),
        }
    }

    fn reason(&self) -> Option<CancelReason> {
        match self {
            Self::Cancel(cancel) => cancel.reason(),
            Self::Token(token) => token.is_cancelled().then_some(CancelReason::Unspecified),
        }
    }

    fn wait(&self) -> WaitForCancellationFutureOwned {
        match self {
            Self::Cancel(cancel) => cancel.wait(),
            Self::Token(token) => token.clone().cancelled_owned(),
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
        Source::Token(self.clone())
    }
}
