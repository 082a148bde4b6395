//! Measures what the kernel programs cost, by turning the kernel's own statistics on for a moment now and then.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use super::kernel::{Kernel, measure_run_time};

/// Measured for one turn of so many: the measuring itself costs about as much as the smallest program.
const TURNS: u32 = 20;

/// The kernel programs' CPU time, extrapolated from samples of it.
#[derive(Default)]
pub struct CostMeter {
    turn: u32,
    measuring: Option<Measuring>,
    last_turn: Option<Instant>,
    /// CPU time a second, as last measured.
    rate: f64,
    total: Duration,
}

struct Measuring {
    /// Dropping it turns the statistics off.
    _statistics: OwnedFd,
    since: Instant,
    before: Duration,
}

impl CostMeter {
    /// One turn: charges the time since the last one, and starts or ends a measurement when it is time.
    pub fn turn(&mut self, kernel: &Kernel) {
        let now = Instant::now();
        if let Some(measuring) = self.measuring.take() {
            let cost = kernel.run_time().saturating_sub(measuring.before);
            self.rate = cost.as_secs_f64() / (now - measuring.since).as_secs_f64().max(1e-3);
        }
        if let Some(last) = self.last_turn.replace(now) {
            self.total += (now - last).mul_f64(self.rate);
        }
        if self.turn.is_multiple_of(TURNS) {
            self.measuring = measure_run_time().map(|statistics| Measuring {
                _statistics: statistics,
                since: now,
                before: kernel.run_time(),
            });
        }
        self.turn += 1;
    }

    pub fn total(&self) -> Duration {
        self.total
    }
}
