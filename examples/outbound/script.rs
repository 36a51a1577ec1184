//! The story that every server acts out: phases on a timeline, each with its own weather.
//!
//! A script is plain data and a pure function of the time since its start, so that all servers that were given the
//! same script, the same start and the same seed have the same good and bad moments.

use std::time::Duration;

/// A chapter of the story.
#[derive(Clone, Debug)]
pub struct Phase {
    pub name: &'static str,
    /// What happens in it, in a few words for the reader of the table.
    pub story: &'static str,
    pub lasts: Duration,
    pub weather: Weather,
    /// How many times the usual number of calls are made.
    pub load: u32,
}

/// How the server behaves. Times and shares are those of the server; what comes of them is measured, not scripted.
#[derive(Clone, Copy, Debug)]
pub enum Weather {
    Fair,
    /// A share of the requests keeps a worker busy for a long time.
    SlowTail {
        share: f64,
        shortest: Duration,
        longest: Duration,
    },
    /// At the beginning of each period everything is answered with 503, at once.
    Bursts {
        every: Duration,
        lasts: Duration,
    },
    /// A quota that another tenant bites into once in a period. Refused requests count against it too.
    Quota {
        per_second: f64,
        burst: f64,
        bite: f64,
        every: Duration,
    },
    /// A share of the connections is reset before the answer, another in the middle of the body.
    Broken {
        reset: f64,
        cut: f64,
    },
    /// Nobody listens: connections are refused, those that stood are closed.
    Refusing,
    /// The server takes requests and says nothing.
    Hanging,
    /// Back, with cold caches: this many times slower at first, normal after `lasts`.
    Cold {
        slower: f64,
        lasts: Duration,
    },
}

/// Phases in order, and the seed of the server's dice.
#[derive(Clone, Debug)]
pub struct Script {
    pub phases: Vec<Phase>,
    pub seed: u64,
}

impl Script {
    /// The whole story, each phase lasting `each`.
    pub fn story(each: Duration, seed: u64) -> Self {
        let ms = Duration::from_millis;
        let phase = |name, story, weather| Phase { name, story, lasts: each, weather, load: 1 };
        let phases = vec![
            phase("healthy", "everything works", Weather::Fair),
            phase(
                "slow tail",
                "1.2 % of the requests take 0.4 to 2.5 s of a worker",
                Weather::SlowTail { share: 0.012, shortest: ms(400), longest: ms(2_500) },
            ),
            phase(
                "503 bursts",
                "100 ms of nothing but 503 in every 700 ms",
                Weather::Bursts { every: ms(700), lasts: ms(100) },
            ),
            phase(
                "429 quota",
                "a neighbour eats 120 of a quota of 600/s every 2 s; refused requests count; Retry-After: 1",
                Weather::Quota { per_second: 600.0, burst: 40.0, bite: 120.0, every: ms(2_000) },
            ),
            phase(
                "broken",
                "8 % of the connections reset, 8 % of the bodies cut in half",
                Weather::Broken { reset: 0.08, cut: 0.08 },
            ),
            Phase {
                load: 4,
                ..phase("too much of ours", "the server is well, and we call it at twice what it can do", Weather::Fair)
            },
            phase("refusing", "full outage: nobody listens", Weather::Refusing),
            phase("hanging", "full outage: requests are taken and never answered", Weather::Hanging),
            phase(
                "recovery",
                "back, at first with cold caches and two thirds as fast",
                Weather::Cold { slower: 1.5, lasts: each / 3 },
            ),
        ];
        Self { phases, seed }
    }

    /// One phase in which nothing is known about the server: it is somebody else's.
    pub fn remote(lasts: Duration, seed: u64) -> Self {
        let phase =
            Phase { name: "remote", story: "a server that was here already", lasts, weather: Weather::Fair, load: 1 };
        Self { phases: vec![phase], seed }
    }

    pub fn lasts(&self) -> Duration {
        self.phases.iter().map(|phase| phase.lasts).sum()
    }

    /// The phase at this time since the start, and how far into it. The last phase does not end.
    pub fn at(&self, since_start: Duration) -> (usize, Duration) {
        let last = self.phases.len() - 1;
        let mut into = since_start;
        for (index, phase) in self.phases[..last].iter().enumerate() {
            match into.checked_sub(phase.lasts) {
                Some(rest) => into = rest,
                None => return (index, into),
            }
        }
        (last, into)
    }

    /// A number in `0..1` for the `nth` throw of the die called `die`: the same on every server with this seed.
    pub fn throw(&self, nth: u64, die: u64) -> f64 {
        // Splitmix64: each input bit moves each output bit, and neighbouring inputs have nothing in common.
        let mut z = self.seed ^ nth.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ die.wrapping_mul(0xd1b5_4a32_d192_ed03);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}
