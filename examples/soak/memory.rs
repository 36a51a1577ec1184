//! How much memory the process has, where that can be read.

/// In KiB; `None` where there is no `/proc`.
pub fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What is seen of it over the run: the highest while everything warms up, and the highest after that.
#[derive(Debug, Default)]
pub struct Memory {
    pub warm: u64,
    pub after: u64,
}

impl Memory {
    /// What it may grow by once it is warm, for fragmentation and the luck of the dice. In the rest of the minute there
    /// are about 280,000 calls, so a leak of 16 bytes for each is more than that.
    const MARGIN: u64 = 4 * 1024;

    pub fn look(&mut self, warming_up: bool) {
        let Some(resident) = resident() else { return };
        let most = if warming_up { &mut self.warm } else { &mut self.after };
        *most = resident.max(*most);
    }

    pub fn inspect(&self) -> Result<(), String> {
        if self.after <= self.warm + Self::MARGIN {
            return Ok(());
        }
        Err(format!("memory is not flat: {} KiB when warm, {} KiB later", self.warm, self.after))
    }
}
