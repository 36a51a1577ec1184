//! [`Layers`]: several limits on one call, taken all or none.
//!
//! A call that has to get past a limit per address, one per tenant and one for all would, with three gates in a row, pay
//! at the first two and then be refused by the third. Layers ask first and take afterwards, so that a refusal costs
//! nothing anywhere, and its advice is good for all of them.
//!
//! ```
//! use std::time::Duration;
//! use resile::{Keyed, Layers, Policy, TokenBucket};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let per_tenant = Keyed::by("tenant", TokenBucket::per_second(1).burst(2)).build()?;
//! let limits = Layers::new()
//!     .layer("tenant", per_tenant.clone())
//!     .layer("all", TokenBucket::per_second(2).burst(3))
//!     .build()?;
//! let policy = Policy::named("api").gate(limits.clone()).build()?;
//! let call = |tenant: &'static str| policy.call().key("tenant", tenant).run(|| async { Ok::<_, ()>(()) });
//!
//! call("acme").await.unwrap();
//! call("acme").await.unwrap();
//! let error = call("acme").await.unwrap_err();
//! assert_eq!(error.refusal().unwrap().gate(), "tenant");
//! assert_eq!(error.retry_after(), Some(Duration::from_secs(1)));
//!
//! call("other").await.unwrap();
//! let error = call("other").await.unwrap_err();
//! assert_eq!(error.refusal().unwrap().gate(), "all");
//! assert_eq!(per_tenant.with("other", TokenBucket::peek), Some(1), "a refusal costs nothing");
//! # Ok(()) }
//! ```
//!
//! # How it decides
//!
//! Each layer [looks](Gate::look) whether it would let the call in; then the call enters them in order. If one says no,
//! nothing has been taken: the refusal has the name of the first layer that does, its reason, and the time after which
//! all of them would say yes, if they know it. Looks and entering go by one reading of the clock. As long as the last 32
//! calls were let in, the looks are left out.
//!
//! So a no may come when layers before it have been entered: the first after a calm time, or when another call takes the
//! last of something between a look and the entering. Then what was taken goes back as that of a call that
//! [never started](Outcome::NotStarted): permits and probes always, tokens unless somebody else has taken from the same
//! bucket in those nanoseconds; then they stay spent. Never does a call get in without every layer, nor past the limit of
//! any, and while calls are refused one after another, refusals cost nothing.
//!
//! Nobody waits here: a layer that would have the call wait refuses it. To wait for one limit, make that a gate of its
//! own inside of the layers.
//!
//! A gate of your own that has no [`look`](Gate::look) says no only when it is entered.
//!
//! # Cost
//!
//! An entering of each layer and, when calls are being refused, a look at each but the first. The passes are kept in
//! memory that grows with the calls that are in at the same time, to a few times what they need, and is used again: a
//! thread finds a place in there without a lock, if there are no more of them than cores. Past 2^28 calls at a time, for
//! one core, calls are refused as [`Busy`](Reason::Busy).

mod stays;

use std::borrow::Cow;
use std::fmt;
use std::mem;
use std::sync::Arc;

use self::stays::{Place, Stays};
use crate::call::Call;
use crate::error::{ConfigError, Faults, Name, Reason, Refusal};
use crate::gate::{Entry, Gate, IntoGate, Needs, Outcome, Pass, by_reference};
use crate::guard::guarded;
use crate::internal::stripe;
use crate::internal::sync::{AtomicU64, Relaxed};
use crate::step::{self, Step};

/// More limits than this on one call nobody can follow.
const MOST_LAYERS: usize = 16;
/// After so many calls in a row that were let in, layers are entered without a look first.
const CALM: u64 = 32;

/// Several gates that a call enters all or none of; see the [module](self).
///
/// A cheap handle: clones share the gates.
#[derive(Clone)]
pub struct Layers(Arc<Shared>);

struct Shared {
    layers: Box<[Layer]>,
    /// How many calls have to be let in until it is calm. A hint: it may miss some.
    wary: AtomicU64,
    stays: Stays,
    needs: Needs,
    name: Name,
}

struct Layer {
    name: Name,
    step: Step,
    refused: AtomicU64,
}

impl Layer {
    fn gate(&self) -> &dyn Gate {
        self.step.as_gate().expect("a layer is a gate")
    }
}

/// Settings of [`Layers`].
#[must_use = "a builder does nothing until it is built"]
pub struct LayersBuilder {
    layers: Vec<Layer>,
    faults: Faults,
    name: Name,
}

impl LayersBuilder {
    /// Adds a layer: a gate, or the builder of one. Refusals carry the name given here.
    pub fn layer(mut self, name: impl Into<Cow<'static, str>>, gate: impl IntoGate) -> Self {
        let name = Name::from(name.into());
        match gate.into_gate() {
            Ok(gate) => self.layers.push(Layer { name, step: Step::gate(gate), refused: AtomicU64::new(0) }),
            Err(wrong) => self.faults.absorb(|own, part| format!("{own}, layer {:?}: {part}", name.as_str()), wrong),
        }
        self
    }

    /// The name in a drawn policy: `layers` by default.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = Name::from(name.into());
        self
    }

    /// The layers.
    ///
    /// # Errors
    ///
    /// No layer or more than 16, and every wrong setting of their gates.
    pub fn build(mut self) -> Result<Layers, ConfigError> {
        let count = self.layers.len();
        // A faulty layer is told as such.
        if self.faults.is_empty() {
            self.faults.check((1..=MOST_LAYERS).contains(&count), "layers", &count, "1 to 16");
        }
        self.faults.into_result()?;
        Ok(Layers(Arc::new(Shared {
            needs: self.layers.iter().map(|layer| layer.gate().needs()).max().unwrap_or(Needs::Nothing),
            layers: self.layers.into(),
            wary: AtomicU64::new(0),
            stays: Stays::new(count, stripe::count(), stays::CHUNKS),
            name: self.name,
        })))
    }
}

impl IntoGate for LayersBuilder {
    type Gate = Layers;

    fn into_gate(self) -> Result<Layers, ConfigError> {
        self.build()
    }
}

by_reference!(Layers);
guarded!(Layers, "pass", "passes");

impl Layers {
    /// Begins without any layer.
    #[allow(clippy::new_ret_no_self, reason = "what is begun here is finished by `build`, as everywhere")]
    pub const fn new() -> LayersBuilder {
        LayersBuilder { layers: Vec::new(), faults: Faults::at("layers"), name: Name::Static("layers") }
    }

    /// How often each layer has refused a call, in their order.
    pub fn refused(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.layers.iter().map(|layer| (layer.name.as_str(), layer.refused.load(Relaxed)))
    }

    /// The refusal of a call that this layer does not let in.
    #[cold]
    fn refuse(&self, layer: usize, refusal: Refusal) -> Entry {
        let layer = &self.0.layers[layer];
        layer.refused.fetch_add(1, Relaxed);
        self.0.wary.store(CALM, Relaxed);
        Entry::Refused(refusal.in_name_of(&layer.name))
    }

    /// One of the layers has said no. The others that have not been asked are, for the first of them and the latest time.
    #[cold]
    fn refuse_and_ask(&self, at: usize, refusal: Refusal, call: &Call) -> Entry {
        let mut latest = refusal.retry_after();
        let mut first = (at, refusal);
        let layers = self.0.layers.iter().enumerate();
        // Those between the first and this one have said yes, the first perhaps not yet.
        for (place, layer) in layers.filter(|(place, _)| *place > at || *place == 0 && at > 0) {
            if let Err(other) = layer.gate().look(call) {
                latest = latest.zip(other.retry_after()).map(|(a, b)| a.max(b));
                if place < first.0 {
                    first = (place, other);
                }
            }
        }
        let (place, refusal) = first;
        self.refuse(place, refusal.coming_after(latest))
    }

    /// Enters the layers in order. What has been entered is left again if one says no or panics.
    #[inline]
    fn enter_all(&self, place: Place<'_>, call: &Call) -> Result<Pass, (usize, Refusal)> {
        let _in_haste = call.in_haste();
        let mut entered = Entered { layers: &self.0.layers, count: 0, place, outcome: &Outcome::NotStarted };
        for layer in &self.0.layers {
            match layer.step.0.enter(call) {
                Entry::Pass(pass) => entered.place.set(entered.count, &pass),
                entry => {
                    let place = entered.count;
                    let refusal = step::refuse(layer.gate(), call, entry);
                    entered.leave();
                    return Err((place, refusal));
                }
            }
            entered.count += 1;
        }
        mem::forget(entered);
        Ok(place.pass())
    }
}

/// The layers that were entered, from the first on. Their place is given up when they have been left.
struct Entered<'a> {
    layers: &'a [Layer],
    count: usize,
    place: Place<'a>,
    outcome: &'a Outcome,
}

impl Entered<'_> {
    /// Leaves them from the last back. If one panics, the drop goes on with those further out.
    #[inline]
    fn leave(&mut self) {
        while let Some(last) = self.count.checked_sub(1) {
            self.count = last;
            self.layers[last].step.0.leave(self.place.get(last), self.outcome);
        }
    }
}

impl Drop for Entered<'_> {
    #[inline]
    fn drop(&mut self) {
        self.leave();
        self.place.give_up();
    }
}

impl Gate for Layers {
    #[inline]
    fn enter(&self, call: &Call) -> Entry {
        let wary = self.0.wary.load(Relaxed);
        if wary > 0 {
            // The first one is entered before the others are, so that it need not look before.
            for (place, layer) in self.0.layers.iter().enumerate().skip(1) {
                if let Err(refusal) = layer.gate().look(call) {
                    return self.refuse_and_ask(place, refusal, call);
                }
            }
        }
        let Some(place) = self.0.stays.claim(stripe::own()) else {
            return Entry::Refused(Refusal::by(self.0.name.clone(), Reason::Busy));
        };
        match self.enter_all(place, call) {
            Ok(pass) => {
                if wary > 0 {
                    self.0.wary.store(wary - 1, Relaxed);
                }
                Entry::Pass(pass)
            }
            Err((place, refusal)) if wary > 0 => self.refuse(place, refusal),
            Err((place, refusal)) => self.refuse_and_ask(place, refusal, call),
        }
    }

    #[inline]
    fn leave(&self, pass: Pass, outcome: Outcome) {
        let layers = &*self.0.layers;
        if let Some(place) = self.0.stays.find(&pass) {
            Entered { layers, count: layers.len(), place, outcome: &outcome }.leave();
        }
    }

    fn settle(&self, pass: &mut Pass, call: &Call, actual: u32) {
        let Some(place) = self.0.stays.find(pass) else { return };
        for (number, layer) in self.0.layers.iter().enumerate() {
            let mut pass = place.get(number);
            layer.gate().settle(&mut pass, call, actual);
            place.set(number, &pass);
        }
    }

    fn still(&self, pass: &Pass, call: &Call) -> Result<(), Refusal> {
        let Some(place) = self.0.stays.find(pass) else { return Ok(()) };
        for (number, layer) in self.0.layers.iter().enumerate() {
            let still = layer.gate().still(&place.get(number), call);
            still.map_err(|refusal| refusal.in_name_of(&layer.name))?;
        }
        Ok(())
    }

    fn look(&self, call: &Call) -> Result<(), Refusal> {
        for layer in &self.0.layers {
            layer.gate().look(call).map_err(|refusal| refusal.in_name_of(&layer.name))?;
        }
        Ok(())
    }

    fn needs(&self) -> Needs {
        self.0.needs
    }

    fn name(&self) -> &str {
        self.0.name.as_str()
    }

    fn draw(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        for (place, layer) in self.0.layers.iter().enumerate() {
            let before = if place == 0 { " (" } else { ", " };
            write!(f, "{before}{}: {}", layer.name.as_str(), layer.step)?;
        }
        f.write_str(")")
    }
}

impl fmt::Debug for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layers").field("name", &self.0.name).field("layers", &self.0.layers).finish_non_exhaustive()
    }
}

impl fmt::Debug for LayersBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayersBuilder").field("layers", &self.layers).finish_non_exhaustive()
    }
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name.as_str(), self.gate().name())
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::semaphore::Semaphore;

    /// Panics on the way in if the call costs 2, on the way out if it costs 3.
    struct Brittle;

    impl Gate for Brittle {
        fn enter(&self, call: &Call) -> Entry {
            assert_ne!(call.cost(), 2);
            Entry::Pass(Pass::new(call.cost().into(), 0))
        }

        fn leave(&self, pass: Pass, _: Outcome) {
            assert_ne!(pass.words()[0], 3);
        }
    }

    #[test]
    fn a_place_comes_back_however_a_call_ends() {
        let permits = Semaphore::permits(3).build().unwrap();
        let mut layers = Layers::new().layer("brittle", Brittle).layer("permits", permits).build().unwrap();
        // Of 16 places, not of millions.
        Arc::get_mut(&mut layers.0).unwrap().stays = Stays::new(2, stripe::count(), 1);
        for call in 0..200 {
            let cost = 1 + call % 4;
            let went = catch_unwind(AssertUnwindSafe(|| layers.try_acquire_many(cost).map(drop)));
            match cost {
                1 => assert!(matches!(went, Ok(Ok(())))),
                2 | 3 => assert!(went.is_err()),
                _ => assert_eq!(went.unwrap().unwrap_err().gate(), "permits", "it costs more than there are"),
            }
        }
    }
}

#[cfg(all(test, resile_loom))]
mod loom {
    use loom::thread;

    use std::sync::Arc;

    use super::Layers;
    use super::stays::Stays;
    use crate::call::Call;
    use crate::gate::{Entry, Gate, Outcome, Pass};
    use crate::loom::explore;
    use crate::rate::TokenBucket;
    use crate::semaphore::Semaphore;

    /// Whether it got in. Then it leaves, its operation done.
    fn pass_by(layers: &Layers) -> bool {
        match layers.enter(&Call::alone(1, false)) {
            Entry::Pass(pass) => {
                layers.leave(pass, Outcome::NotStarted);
                true
            }
            Entry::Refused(_) => false,
            Entry::Wait(..) => panic!("nobody waits here"),
        }
    }

    /// Two go for the last permit, calm or wary. Whoever gets in has passed both layers; what is given back makes no
    /// token, and no permit is lost.
    #[test]
    fn two_who_race_for_the_last_of_the_inner_layer_make_nothing_and_lose_no_permit() {
        for wary in [false, true] {
            explore(move || {
                let outer = TokenBucket::per_second(1).burst(4).build().unwrap();
                let inner = Semaphore::permits(1).build().unwrap();
                let layers = Layers::new().layer("outer", outer.clone()).layer("inner", inner.clone()).build().unwrap();
                if wary {
                    let held = inner.enter(&Call::alone(1, false));
                    assert!(!pass_by(&layers));
                    let Entry::Pass(held) = held else { panic!("it was free") };
                    inner.leave(held, Outcome::NotStarted);
                }
                assert_eq!(outer.peek(), 4);
                let other = layers.clone();
                let thread = thread::spawn(move || pass_by(&other));
                let both = [pass_by(&layers), thread.join().unwrap()];
                assert!(both.contains(&true));
                assert_eq!((inner.in_use(), inner.queued()), (0, 0));
                // A token that another has taken after stays spent.
                assert!((2..=4).contains(&outer.peek()), "{}", outer.peek());
            });
        }
    }

    /// The owner of a stripe claims a place that another thread gives up: neither sees what the other keeps there.
    #[test]
    fn a_place_that_is_given_up_on_one_thread_is_claimed_on_another() {
        explore(|| {
            let stays = Arc::new(Stays::new(1, 2, 1));
            let keep = |stays: &Stays, word| {
                let place = stays.claim(1).unwrap();
                place.set(0, &Pass::new(word, word));
                place.pass()
            };
            let leave = |stays: &Stays, pass: &Pass, word| {
                let place = stays.find(pass).unwrap();
                assert_eq!(place.get(0), Pass::new(word, word));
                place.give_up();
                assert!(stays.find(pass).is_none());
            };
            let first = keep(&stays, 1);
            let other = thread::spawn({
                let stays = stays.clone();
                move || leave(&stays, &first, 1)
            });
            let second = keep(&stays, 2);
            leave(&stays, &second, 2);
            other.join().unwrap();
        });
    }
}
