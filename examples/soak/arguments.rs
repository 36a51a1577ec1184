//! The command line: `[--quick] [--seed N]`.

use std::time::Duration;

pub const USAGE: &str = "usage: soak [--quick] [--seed N]

  --quick   8 seconds instead of a minute
  --seed N  the dice, a whole number; drawn and printed if not given";

/// What was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Arguments {
    pub seconds: u64,
    pub seed: u64,
}

impl Arguments {
    /// Reads the arguments that follow the program's name; `None` if help was asked for.
    pub fn parse(given: impl IntoIterator<Item = String>) -> Result<Option<Self>, String> {
        let mut arguments = Self { seconds: 60, seed: rand::random::<u32>().into() };
        let mut given = given.into_iter();
        while let Some(argument) = given.next() {
            match argument.as_str() {
                "--help" | "-h" => return Ok(None),
                "--quick" => arguments.seconds = 8,
                "--seed" => {
                    let value = given.next().ok_or("--seed needs a number after it")?;
                    arguments.seed = value
                        .parse()
                        .map_err(|cause| format!("--seed takes a whole number, not {value:?}: {cause}"))?;
                }
                unknown => return Err(format!("unknown argument {unknown:?}")),
            }
        }
        Ok(Some(arguments))
    }

    pub fn lasting(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }
}
