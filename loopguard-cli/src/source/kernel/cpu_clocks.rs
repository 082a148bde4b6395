//! The sampling clocks of the CPUs: one ticks on each as long as loops are watched.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use aya::{
    programs::{
        PerfEvent,
        perf_event::{PerfEventLink, PerfEventScope},
    },
    util::online_cpus,
};

use super::attach_clock;

/// A clock that has not ticked for so many periods does not tick any more,
const MISSED_PERIODS: u32 = 4;
/// nor for less than this: the host may have kept a CPU for itself.
const LOOK_EVERY: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct CpuClocks {
    links: Vec<PerfEventLink>,
    period_ns: u64,
    looked: Option<Look>,
}

/// What had happened by then.
struct Look {
    at: Instant,
    /// Samples so far, by CPU.
    samples: Vec<u64>,
}

impl CpuClocks {
    /// Has one tick on every CPU that is online, in the place of those there were.
    ///
    /// # Errors
    /// When it can't be found out which these are, or the first can't be attached.
    pub fn start(&mut self, program: &mut PerfEvent, period_ns: u64) -> Result<()> {
        let mut links = Vec::new();
        for cpu in cpus()? {
            match attach_clock(program, PerfEventScope::AllProcessesOneCpu { cpu }, period_ns) {
                Ok(link) => links.push(program.take_link(link)?),
                // It went away just now.
                Err(_) if !links.is_empty() => {}
                Err(error) => return Err(error),
            }
        }
        *self = Self { links, period_ns, looked: None };
        Ok(())
    }

    pub fn stop(&mut self) {
        *self = Self::default();
    }

    /// Whether they tick with another period than this one.
    pub fn tick_otherwise(&self, period_ns: u64) -> bool {
        !self.links.is_empty() && self.period_ns != period_ns
    }

    /// Whether one has to be started anew. A CPU that goes away takes its clock along, and comes back without; all but
    /// one do that when a machine is suspended. `samples`: how many there were on each CPU until now.
    pub fn want_start(&mut self, samples: impl FnOnce() -> Vec<u64>) -> bool {
        let every = LOOK_EVERY.max(Duration::from_nanos(self.period_ns) * MISSED_PERIODS);
        let (now, before) = (Instant::now(), &self.looked);
        if self.links.is_empty() || before.as_ref().is_some_and(|before| now - before.at < every) {
            return false;
        }
        let samples = samples();
        let online = cpus().unwrap_or_default();
        let stands = before.as_ref().is_some_and(|before| one_stands(&online, &before.samples, &samples));
        self.looked = Some(Look { at: now, samples });
        stands
    }
}

fn cpus() -> Result<Vec<u32>> {
    online_cpus().map_err(|(what, error)| anyhow!("find the CPUs ({what}): {error}"))
}

/// Whether one of these CPUs has had no sample meanwhile.
fn one_stands(online: &[u32], before: &[u64], now: &[u64]) -> bool {
    online.iter().any(|&cpu| {
        let count = |samples: &[u64]| samples.get(cpu as usize).copied();
        count(now).is_some() && count(before) == count(now)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_stands_is_seen_where_its_cpu_is() {
        let before = [5, 7, 9];
        assert!(!one_stands(&[0, 1, 2], &before, &[6, 8, 10]));
        assert!(one_stands(&[0, 1, 2], &before, &[6, 7, 10]));
        assert!(!one_stands(&[0, 2], &before, &[6, 7, 10]), "a CPU that is away has no samples");
        assert!(!one_stands(&[0, 3], &before, &[6, 7, 10]), "nothing is counted of a CPU that is not known");
    }
}
