//! Measures what the kernel programs cost, by turning the kernel's own statistics on for a moment now and then.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use super::kernel::{Kernel, measure_run_time};

/// Measured for one turn, this often: the measuring itself costs about as much as the smallest program.
const MEASURE_EVERY: Duration = Duration::from_secs(4);

/// The kernel programs' CPU time, extrapolated from samples of it.
#[derive(Default)]
pub struct CostMeter {
    measuring: Option<Measuring>,
    last_measured: Option<Instant>,
    last_turn: Option<Instant>,
    /// CPU time a second, as last measured while loops were watched.
    rate: f64,
    /// Nothing is attached that costs anything.
    rests: bool,
    total: Duration,
    /// The kernel does not measure it for us.
    is_denied: bool,
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
        self.charge(kernel, now);
        if !self.rests && self.last_measured.is_none_or(|last| now - last >= MEASURE_EVERY) {
            self.last_measured = Some(now);
            self.measuring = measure_run_time().map(|statistics| Measuring {
                _statistics: statistics,
                since: now,
                before: kernel.run_time(),
            });
            self.is_denied = self.measuring.is_none();
        }
    }

    fn charge(&mut self, kernel: &Kernel, now: Instant) {
        if let Some(measuring) = self.measuring.take() {
            let cost = kernel.run_time().saturating_sub(measuring.before);
            self.rate = cost.as_secs_f64() / (now - measuring.since).as_secs_f64().max(1e-3);
        }
        if let Some(last) = self.last_turn.replace(now) {
            self.total += (now - last).mul_f64(if self.rests { 0.0 } else { self.rate });
        }
    }

    /// What it costs changes from here on: it is measured anew.
    pub fn changes(&mut self, kernel: &Kernel) {
        self.last_measured = None;
        self.turn(kernel);
    }

    /// From now on nothing is attached that costs anything, or something again.
    pub fn set_rests(&mut self, rests: bool, kernel: &Kernel) {
        self.charge(kernel, Instant::now());
        self.rests = rests;
        self.changes(kernel);
    }

    /// Whether [`total`](Self::total) is 0 because it cannot be measured.
    pub fn is_denied(&self) -> bool {
        self.is_denied
    }

    pub fn total(&self) -> Duration {
        self.total
    }
}
