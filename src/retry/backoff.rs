//! How long to wait before each retry: strategies, jitter, and delays of your own.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::internal::rng::{mix, up_to};
use crate::internal::time::nanos;

/// A source of delays: any iterator of durations that can be started anew for each call.
///
/// When the iterator ends, so do the retries. It is boxed at a call's first retry; the built-in strategies need no
/// allocation.
///
/// ```
/// use std::time::Duration;
/// use resile::Retry;
///
/// let fixed = Retry::with([Duration::from_millis(10), Duration::from_millis(100)]);
/// let squares = Retry::with((1..).map(|n: u32| Duration::from_millis(10) * n * n));
/// # let _ = (fixed, squares);
/// ```
pub trait Backoff: Send + Sync + 'static {
    /// The delays of one call, from its first retry on.
    ///
    /// A strategy with settings of its own:
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Backoff;
    /// struct Steps {
    ///     quick: usize,
    /// }
    /// impl Backoff for Steps {
    ///     fn delays(&self) -> Box<dyn Iterator<Item = Duration> + Send> {
    ///         let quick = std::iter::repeat_n(Duration::from_millis(10), self.quick);
    ///         Box::new(quick.chain(std::iter::repeat(Duration::from_secs(1))))
    ///     }
    /// }
    ///
    /// let first: Vec<_> = Steps { quick: 2 }.delays().take(3).map(|delay| delay.as_millis()).collect();
    /// assert_eq!(first, [10, 10, 1000]);
    /// ```
    fn delays(&self) -> Box<dyn Iterator<Item = Duration> + Send>;
}

impl<I> Backoff for I
where
    I: IntoIterator<Item = Duration> + Clone + Send + Sync + 'static,
    I::IntoIter: Send + 'static,
{
    fn delays(&self) -> Box<dyn Iterator<Item = Duration> + Send> {
        Box::new(self.clone().into_iter())
    }
}

/// How a delay is spread, so that callers who failed together don't come back together.
///
/// The spread delay is never longer than `max_delay`. Where a peer or a gate has said when to come back, that moment takes
/// the place of the part that is not spread, so that those who were told the same don't come back together either.
///
/// The names are those of Marc Brooker's "Exponential Backoff And
/// Jitter" (2015).
///
/// ```
/// # use std::time::Duration;
/// # use resile::{Jitter, Policy, Retry};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// for (jitter, least, most) in [
///     (Jitter::None, 100, 100),
///     (Jitter::Full, 0, 100),
///     (Jitter::Equal, 50, 100),
///     (Jitter::Decorrelated, 100, 300),
/// ] {
///     let retry = Retry::constant(Duration::from_millis(100)).jitter(jitter).max_attempts(2);
///     let policy = Policy::named("users").retry(retry).build()?;
///     let mut waits = Vec::new();
///     for _ in 0..30 {
///         let start = tokio::time::Instant::now();
///         assert!(policy.run(|| async { Err::<(), _>("down") }).await.is_err());
///         waits.push(start.elapsed().as_millis());
///     }
///     assert!(waits.iter().all(|wait| (least..=most + 2).contains(wait)), "with the timer's grain");
///     assert_eq!(waits.iter().all(|wait| *wait == waits[0]), jitter == Jitter::None);
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Jitter {
    /// The delay as computed, or the hint if it is longer.
    None,
    /// Anything from nothing to the delay. Spreads best, and is the default of exponential backoff.
    Full,
    /// Half of the delay, and anything up to the other half: a retry is never immediate.
    Equal,
    /// Anything from the first delay to three times the previous one, whatever the strategy. With delays of your own,
    /// anything from each of them to three times the previous pause.
    Decorrelated,
}

#[derive(Clone)]
pub(crate) enum Curve {
    Constant(u64),
    Linear(u64),
    Exponential { first: u64, factor: f64 },
    Fibonacci(u64),
    Own(Arc<dyn Backoff>),
}

impl Curve {
    /// The delay before retry `n`, counted from 1, in nanoseconds; saturates. `None` for a strategy of the user's own.
    fn raw(&self, n: u32) -> Option<u64> {
        Some(match self {
            Self::Constant(delay) => *delay,
            Self::Linear(first) => first.saturating_mul(n.into()),
            // A float as large as the cast's range or infinite becomes the largest integer, a zero stays one.
            Self::Exponential { first, factor } => {
                (*first as f64 * factor.powi(i32::try_from(n).map_or(i32::MAX, |n| n - 1))) as u64
            }
            Self::Fibonacci(first) => first.saturating_mul(fibonacci(n)),
            Self::Own(_) => return None,
        })
    }

    /// The delay before the first retry; `None` for a strategy of the user's own.
    pub(crate) fn first(&self) -> Option<u64> {
        self.raw(1)
    }
}

fn fibonacci(n: u32) -> u64 {
    let (mut a, mut b) = (0_u64, 1_u64);
    for _ in 0..n.min(94) {
        (a, b) = (b, a.saturating_add(b));
    }
    a
}

impl fmt::Display for Curve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constant(0) => f.write_str("immediate"),
            Self::Constant(delay) => write!(f, "constant {:?}", Duration::from_nanos(*delay)),
            Self::Linear(first) => write!(f, "linear {:?}", Duration::from_nanos(*first)),
            Self::Exponential { first, .. } => write!(f, "exponential {:?}", Duration::from_nanos(*first)),
            Self::Fibonacci(first) => write!(f, "fibonacci {:?}", Duration::from_nanos(*first)),
            Self::Own(_) => f.write_str("own backoff"),
        }
    }
}

impl fmt::Debug for Curve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The delays of those retry steps of a call that have a backoff of the user's own.
#[derive(Default)]
pub(crate) struct Delays(Option<Vec<Running>>);

struct Running {
    /// The retry step's place in the policy.
    place: usize,
    /// Which delay was asked for last, and what it was.
    n: u32,
    delay: Option<Duration>,
    rest: Box<dyn Iterator<Item = Duration> + Send>,
}

impl Delays {
    /// Whether a call has begun one.
    pub(crate) fn is_running(&self) -> bool {
        self.0.is_some()
    }

    /// The delay before retry `n`. Asked for the same again, it is the same.
    fn nth(&mut self, place: usize, n: u32, backoff: &Arc<dyn Backoff>) -> Option<Duration> {
        let all = self.0.get_or_insert_default();
        if n == 1 {
            all.retain(|running| running.place != place);
            all.push(Running { place, n: 0, delay: None, rest: backoff.delays() });
        }
        let running = all.iter_mut().find(|running| running.place == place)?;
        if running.n != n {
            (running.n, running.delay) = (n, running.rest.next());
        }
        running.delay
    }
}

impl fmt::Debug for Delays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Delays").field(&self.0.as_ref().map_or(0, Vec::len)).finish()
    }
}

/// A strategy with its jitter and its cap: the machine that says how long.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    pub(crate) curve: Curve,
    pub(crate) jitter: Jitter,
    /// The longest delay, in nanoseconds. It holds after jitter. A built-in strategy's first delay is at most this.
    pub(crate) cap: u64,
}

/// Which delay is asked for.
pub(crate) struct Ask {
    /// The retry step's place in the policy.
    pub(crate) place: usize,
    /// Which retry, counted from 1.
    pub(crate) n: u32,
    /// The delay before, in nanoseconds.
    pub(crate) previous: u64,
    /// Random bits of this call and this retry.
    pub(crate) bits: u64,
}

/// A delay in two parts, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Delay {
    /// What is waited in any case; a hint may take its place.
    least: u64,
    /// What chance adds.
    spread: u64,
}

impl Delay {
    /// Without a hint.
    pub(crate) fn plain(self) -> u64 {
        self.not_before(0)
    }

    /// With a hint: never earlier than it, and as spread as without.
    pub(crate) fn not_before(self, hint: u64) -> u64 {
        self.least.max(hint).saturating_add(self.spread)
    }
}

impl Schedule {
    /// The delay, or `None` when the user's iterator has ended.
    pub(crate) fn delay(&self, ask: &Ask, delays: &mut Delays) -> Option<Delay> {
        let raw = match &self.curve {
            Curve::Own(backoff) => nanos(delays.nth(ask.place, ask.n, backoff)?),
            built_in => built_in.raw(ask.n)?,
        };
        let delay = raw.min(self.cap);
        let (least, most) = match self.jitter {
            Jitter::None => (delay, delay),
            Jitter::Full => (0, delay),
            Jitter::Equal => (delay - delay / 2, delay),
            Jitter::Decorrelated => {
                let low = self.curve.first().unwrap_or(delay).min(self.cap);
                (low, ask.previous.max(low).saturating_mul(3).min(self.cap).max(low))
            }
        };
        Some(Delay { least, spread: up_to(ask.bits, most - least) })
    }
}

/// Random bits for one retry of one call: a pure function, so a seed makes a run repeatable.
pub(crate) fn bits(seed: u64, call: u32, n: u32) -> u64 {
    mix(mix(seed ^ u64::from(call) << 32) ^ u64::from(n))
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    fn schedule(curve: Curve, jitter: Jitter, cap: u64) -> Schedule {
        Schedule { curve, jitter, cap }
    }

    fn delays(schedule: &Schedule, count: u32, seed: u64) -> Vec<u64> {
        let mut own = Delays::default();
        let mut previous = 0;
        (1..=count)
            .map_while(|n| {
                let ask = Ask { place: 0, n, previous, bits: bits(seed, 0, n) };
                schedule.delay(&ask, &mut own).map(Delay::plain).inspect(|delay| previous = *delay)
            })
            .collect()
    }

    #[test]
    fn strategies_grow_as_their_names_say() {
        let plain = |curve| delays(&schedule(curve, Jitter::None, u64::MAX), 6, 0);
        assert_eq!(plain(Curve::Constant(5)), [5, 5, 5, 5, 5, 5]);
        assert_eq!(plain(Curve::Linear(5)), [5, 10, 15, 20, 25, 30]);
        assert_eq!(plain(Curve::Exponential { first: 5, factor: 2.0 }), [5, 10, 20, 40, 80, 160]);
        assert_eq!(plain(Curve::Fibonacci(5)), [5, 5, 10, 15, 25, 40]);
        let own: Arc<dyn Backoff> = Arc::new([Duration::from_nanos(7), Duration::from_nanos(3)]);
        assert_eq!(plain(Curve::Own(own)), [7, 3]);
    }

    /// R1: powers that no integer or float holds end at exactly the cap.
    #[test]
    fn a_delay_that_overflows_is_exactly_the_cap() {
        for curve in [Curve::Exponential { first: MS, factor: 10.0 }, Curve::Linear(u64::MAX / 2), Curve::Fibonacci(MS)]
        {
            let all = delays(&schedule(curve, Jitter::None, 30 * MS), 1000, 0);
            assert_eq!(all[999], 30 * MS);
            assert!(all.iter().all(|delay| *delay <= 30 * MS));
        }
    }

    #[test]
    fn full_jitter_is_uniform() {
        let schedule = schedule(Curve::Constant(999), Jitter::Full, u64::MAX);
        let mut bins = [0_u32; 10];
        for call in 0..20_000 {
            let ask = Ask { place: 0, n: 1, previous: 0, bits: bits(7, call, 1) };
            bins[schedule.delay(&ask, &mut Delays::default()).unwrap().plain() as usize / 100] += 1;
        }
        assert!(bins.iter().all(|n| (1_800..2_200).contains(n)), "{bins:?}");
    }

    proptest! {
        /// Law: 0 <= delay <= cap whatever the curve, the jitter and the seed; equal jitter keeps half.
        #[test]
        fn a_delay_is_never_above_the_cap(
            first in 0_u64..=u64::MAX / 4,
            factor in 1.0_f64..1e6,
            cap in 0_u64..=u64::MAX / 2,
            seed: u64,
            kind in 0..4,
        ) {
            let curve = match kind {
                0 => Curve::Constant(first),
                1 => Curve::Linear(first),
                2 => Curve::Fibonacci(first),
                _ => Curve::Exponential { first, factor },
            };
            let plain = delays(&schedule(curve.clone(), Jitter::None, cap), 70, seed);
            for jitter in [Jitter::None, Jitter::Full, Jitter::Equal, Jitter::Decorrelated] {
                let all = delays(&schedule(curve.clone(), jitter, cap), 70, seed);
                for (delay, plain) in all.iter().zip(&plain) {
                    prop_assert!(*delay <= cap);
                    match jitter {
                        Jitter::Equal => prop_assert!(*delay >= plain / 2 && delay <= plain),
                        Jitter::Full => prop_assert!(delay <= plain),
                        Jitter::Decorrelated => prop_assert!(*delay >= first.min(cap)),
                        _ => prop_assert_eq!(delay, plain),
                    }
                }
            }
        }
    }
}
