//! The limits: per tenant, per plan and per endpoint, all or none.

use std::convert::Infallible;
use std::time::Instant;

use futures::FutureExt as _;
use resile::{ConfigError, Error, Key, KeyRef, Keyed, Layers, Plan, Policy, TokenBucket};

/// What a tenant has bought. A name that nobody knows has bought nothing.
pub fn plan_of(tenant: &str) -> &'static str {
    match tenant.split_once('-') {
        Some(("gold", number)) if number.parse::<u32>().is_ok() => "gold",
        Some(("silver", number)) if number.parse::<u32>().is_ok() => "silver",
        _ => "nobody",
    }
}

pub struct Limits {
    pub tenants: Keyed<TokenBucket>,
    pub plans: Keyed<TokenBucket>,
    layers: Layers,
    policy: Policy,
}

impl Limits {
    pub fn new() -> Result<Self, ConfigError> {
        // A tenant's own limit goes with its plan. Ten thousand can be busy at once.
        let (gold, silver) =
            (Plan::new(TokenBucket::per_second(100).burst(50))?, Plan::new(TokenBucket::per_second(50).burst(25))?);
        let tenants = Keyed::by("tenant", TokenBucket::per_second(1).burst(2))
            .plans(move |tenant| match tenant {
                KeyRef::Text(tenant) => match plan_of(tenant) {
                    "gold" => Some(gold.clone()),
                    "silver" => Some(silver.clone()),
                    _ => None,
                },
                _ => None,
            })
            .capacity(10_000)
            .build()?;
        // All tenants of a plan together: the unknown ones, however many, get a corner of the whole.
        let (paid, unpaid) =
            (TokenBucket::per_second(2000).burst(500), Plan::new(TokenBucket::per_second(100).burst(50))?);
        let plans = Keyed::by("plan", paid)
            .plans(move |plan| (plan == KeyRef::Text("nobody")).then(|| unpaid.clone()))
            .capacity(16)
            .build()?;
        // What each endpoint can take.
        let endpoints = Keyed::by("endpoint", TokenBucket::per_second(1000).burst(300)).capacity(16).build()?;
        let layers = Layers::new()
            .layer("tenant", tenants.clone())
            .layer("plan", plans.clone())
            .layer("endpoint", endpoints)
            .build()?;
        let policy = Policy::named("api").gate(layers.clone()).build()?;
        Ok(Self { tenants, plans, layers, policy })
    }

    /// Answers a request, or says why not.
    pub async fn admit(&self, tenant: &str, endpoint: &str) -> Result<(), Error<Infallible>> {
        let call = self.policy.call().key("tenant", tenant).key("plan", plan_of(tenant)).key("endpoint", endpoint);
        call.no_wait().run(|| async { Ok(()) }).await
    }

    pub fn refused(&self) -> [(String, u64); 3] {
        let mut refused = self.layers.refused().map(|(layer, count)| (layer.to_owned(), count));
        std::array::from_fn(|_| refused.next().unwrap_or_default())
    }

    /// The same decisions without HTTP, under ever new names.
    pub fn decisions_per_second() -> Result<f64, ConfigError> {
        const DECISIONS: u32 = 100_000;
        // Counted apart, so that the figures that are shown are those of the API.
        let apart = Self::new()?;
        let start = Instant::now();
        for number in 0..DECISIONS {
            let _ = apart.admit(&format!("made-up-{number}"), "/orders").now_or_never();
        }
        Ok(f64::from(DECISIONS) / start.elapsed().as_secs_f64())
    }
}

pub fn show(key: &Key) -> String {
    KeyRef::from(key).to_string()
}
