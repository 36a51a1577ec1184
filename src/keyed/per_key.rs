//! [`PerKey`]: what a gate has to know so that there can be one of it per key.

use crate::call::Call;
use crate::error::Reason;
use crate::gate::{Gate, Needs};
use crate::internal::time::Moment;
use crate::rate::{LeakyBucket, Quota, SlidingWindow, TokenBucket};

/// What a gate whose state is a word says to a call.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WordEntry {
    /// It is in: the word after.
    In(u64),
    /// It would be in from this moment on.
    Later(Moment),
    /// It never will be.
    Never(Reason),
}

/// A gate of which there can be one per key in a [`Keyed`](crate::Keyed).
///
/// The built-in gates implement it; a gate of your own needs two methods:
///
/// ```
/// use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
/// use resile::{Call, Entry, Gate, Guard, Keyed, Moment, Outcome, Pass, PerKey, Reason, Refusal};
///
/// /// Lets each key in so often, ever.
/// struct Trial { left: AtomicU64, of: u64 }
///
/// impl Gate for Trial {
///     fn enter(&self, _: &Call) -> Entry {
///         match self.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)) {
///             Ok(_) => Entry::Pass(Pass::default()),
///             Err(_) => Entry::Refused(Refusal::new("trial", Reason::Other("the trial is over"))),
///         }
///     }
///     fn leave(&self, _: Pass, _: Outcome) {}
/// }
///
/// impl PerKey for Trial {
///     fn another(&self) -> Self {
///         Self { left: AtomicU64::new(self.of), of: self.of }
///     }
///     fn is_fresh(&self, _: Moment) -> bool {
///         self.left.load(Relaxed) == self.of
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let trials = Keyed::by("user", Trial { left: AtomicU64::new(2), of: 2 }).capacity(100).build()?;
/// for _ in 0..2 {
///     Guard::try_acquire(trials.of("anna"))?.success();
/// }
/// assert!(Guard::try_acquire(trials.of("anna")).is_err());
/// assert!(Guard::try_acquire(trials.of("bert")).is_ok());
/// # Ok(()) }
/// ```
///
/// All of it is called with no lock held, but must not block.
pub trait PerKey: Gate + Sized {
    /// How much of the clock [`leave`](Gate::leave) needs, whatever the settings.
    const NEEDS: Needs = Needs::Elapsed;

    /// A new gate with the same settings and nothing behind it.
    #[must_use]
    fn another(&self) -> Self;

    /// Whether it would decide everything from now on as a new one would. Then it can be forgotten, and is when its
    /// place is needed. If in doubt, no: what is never fresh keeps its place for ever.
    fn is_fresh(&self, now: Moment) -> bool;

    /// Takes over the settings of another, as far as that can be done while in use, and keeps its state.
    ///
    /// The default takes over nothing: then new settings hold for gates that are made from then on.
    fn adopt(&self, settings: &Self) {
        let _ = settings;
    }

    /// Whether the state of a gate at which nobody waits fits in a word, below 2^63. A new one's is 0. The methods below
    /// are for those that say so; `self` then is the settings.
    #[doc(hidden)]
    const IN_A_WORD: bool = false;

    /// The word after letting in a call of this cost, if that can be said in a few instructions. If not,
    /// [`word_enter`](Self::word_enter) decides.
    #[doc(hidden)]
    fn word_take(&self, word: u64, cost: u32, now: Moment) -> Option<u64> {
        let _ = (word, cost, now);
        None
    }

    /// What a gate in this state says to a call of this cost.
    #[doc(hidden)]
    fn word_enter(&self, word: u64, cost: u32, now: Moment) -> WordEntry {
        let _ = (cost, now);
        WordEntry::In(word)
    }

    /// Why a call is not to wait until then; `None` if it may.
    #[doc(hidden)]
    fn word_wait(&self, call: &Call, due: Moment) -> Option<Reason> {
        let _ = (call, due);
        None
    }

    /// The word after a call that entered at `taken` came to nothing.
    #[doc(hidden)]
    fn word_undo(&self, word: u64, taken: Moment, cost: u32) -> u64 {
        let _ = (taken, cost);
        word
    }

    #[doc(hidden)]
    fn word_is_fresh(&self, word: u64, now: Moment) -> bool {
        let _ = (word, now);
        false
    }

    /// The same state under other settings.
    #[doc(hidden)]
    fn word_for(&self, word: u64, now: Moment, new: &Self) -> u64 {
        let _ = (now, new);
        word
    }

    /// A gate in this state, at which one can wait.
    #[doc(hidden)]
    #[must_use]
    fn word_into(&self, word: u64) -> Self {
        let _ = word;
        self.another()
    }

    /// The state of such a gate as a word again, if it can be.
    #[doc(hidden)]
    fn word_of(&self, gate: &Self) -> Option<u64> {
        let _ = gate;
        None
    }
}

/// A gate whose passes are spent, not held: the limiters of this crate.
pub trait Limiter: PerKey {}

impl Limiter for TokenBucket {}
impl Limiter for LeakyBucket {}
impl Limiter for SlidingWindow {}
impl Limiter for Quota {}
