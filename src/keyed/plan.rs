//! [`Plan`]: settings that many keys share, and that can be changed while in use.

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};

use super::PerKey;
use crate::error::ConfigError;
use crate::gate::IntoGate;
use crate::internal::sync::{Acquire, Mutex, Release};
use crate::internal::time::Moment;

/// Settings for the gates of some keys, such as a tariff: checked when made, and changed for all its keys at once.
///
/// A cheap handle: clones are the same plan. As many plans as you like, one per key if need be.
///
/// ```
/// use resile::{Keyed, KeyRef, Plan, TokenBucket};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let gold = Plan::new(TokenBucket::per_second(1).burst(100))?;
/// let tenants = Keyed::by("tenant", TokenBucket::per_second(1).burst(1))
///     .plans({
///         let gold = gold.clone();
///         move |tenant| (tenant == KeyRef::Text("acme")).then(|| gold.clone())
///     })
///     .build()?;
///
/// tenants.try_take("acme", 60)?;
/// assert!(tenants.try_take("other", 60).is_err());
///
/// gold.set(TokenBucket::per_second(1).burst(50))?;
/// assert!(tenants.try_take("acme", 41).is_err(), "the 40 that were there are there");
/// tenants.try_take("acme", 40)?;
/// # Ok(()) }
/// ```
pub struct Plan<G>(Arc<Current<G>>);

pub(super) struct Current<G>(Mutex<Arc<Version<G>>>);

/// The settings of a plan at some time. Whoever works by them looks whether they still hold.
pub(super) struct Version<G> {
    /// A gate that nobody enters.
    pub(super) settings: G,
    retired: AtomicBool,
    /// What was taken before comes back by no other settings.
    pub(super) since: Moment,
    /// Weak, so that a plan nobody can change any more is forgotten with its last key.
    plan: Weak<Current<G>>,
}

impl<G: PerKey> Plan<G> {
    /// A plan with these settings: those of a gate, or the builder of one.
    ///
    /// # Errors
    ///
    /// Every wrong setting.
    pub fn new(settings: impl IntoGate<Gate = G>) -> Result<Self, ConfigError> {
        // A gate of its own, which nobody else has a handle of.
        let settings = settings.into_gate()?.another();
        Ok(Self(Arc::new_cyclic(|plan| {
            Current(Mutex::new(Arc::new(Version {
                settings,
                retired: AtomicBool::new(false),
                since: Moment::now(),
                plan: plan.clone(),
            })))
        })))
    }

    /// Changes the settings. Each key follows at its next call and keeps its state: a bucket its tokens up to the new
    /// burst, a semaphore the permits that are out, a window or a quota what was taken. A gate that
    /// [adopts](PerKey::adopt) no settings, such as a breaker, or a quota whose windows would have another length, keeps
    /// the old ones for as long as it is in use.
    ///
    /// # Errors
    ///
    /// Every wrong setting. Nothing has changed then.
    pub fn set(&self, settings: impl IntoGate<Gate = G>) -> Result<(), ConfigError> {
        let settings = settings.into_gate()?.another();
        let plan = Arc::downgrade(&self.0);
        let version = Arc::new(Version { settings, retired: AtomicBool::new(false), since: Moment::now(), plan });
        let mut current = self.0.0.lock();
        let old = std::mem::replace(&mut *current, version);
        old.retired.store(true, Release);
        drop(current);
        drop(old);
        Ok(())
    }

    pub(super) fn version(&self) -> Arc<Version<G>> {
        self.0.0.lock().clone()
    }
}

impl<G> Version<G> {
    #[inline]
    pub(super) fn is_retired(&self) -> bool {
        self.retired.load(Acquire)
    }

    /// The plan, if there is a newer version of it.
    pub(super) fn changed(&self) -> Option<Plan<G>> {
        if self.is_retired() { self.plan.upgrade().map(Plan) } else { None }
    }
}

impl<G> Clone for Plan<G> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<G: PerKey + fmt::Debug> fmt::Debug for Plan<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Plan").field(&self.version().settings).finish()
    }
}
