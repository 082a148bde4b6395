//! Turns a loop's own tick lengths into its threshold: a high percentile of them, times a factor.
//!
//! Blocks are left out of the baseline they are measured by: no tick counts that could have reached the threshold that
//! held when it ran. So a bad hour cannot raise the threshold. The past counts less and less: half as much each minute.

use loopguard_common::clock::TICK_BUCKETS;

/// After so long what was seen counts half.
const HALF_LIFE_NS: f64 = 60e9;
/// The threshold stays at the floor until so many ticks were seen,
const ENOUGH_TICKS: f64 = 100.0;
/// or until so long has passed.
const CALIBRATION_NS: u64 = 30_000_000_000;
/// A threshold that differs by less is not worth a change.
const WORTH_A_CHANGE: f64 = 0.1;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptiveSettings {
    /// Of the ticks, 0 to 1.
    pub percentile: f64,
    pub multiplier: f64,
    pub floor_ns: u64,
    pub cap_ns: u64,
}

impl Default for AdaptiveSettings {
    fn default() -> Self {
        Self { percentile: 0.95, multiplier: 5.0, floor_ns: 10_000_000, cap_ns: 200_000_000 }
    }
}

/// How long a step must be to be a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ThresholdRule {
    Fixed {
        ns: u64,
    },
    /// By each loop's own ticks.
    Adaptive(AdaptiveSettings),
}

impl ThresholdRule {
    /// What a loop begins with.
    pub fn initial_ns(&self) -> u64 {
        match self {
            Self::Fixed { ns } => *ns,
            Self::Adaptive(settings) => settings.floor_ns,
        }
    }
}

/// The adaptive threshold of one loop.
#[derive(Clone, Debug)]
pub struct AdaptiveThreshold {
    threshold_ns: u64,
    calibrated: bool,
    since_ns: Option<u64>,
    updated_ns: u64,
    /// What the loop had counted when it was last asked.
    counted: [u32; TICK_BUCKETS],
    /// Ticks that were no blocks, those of long ago faded.
    weights: [f64; TICK_BUCKETS],
}

impl AdaptiveThreshold {
    pub fn new(settings: &AdaptiveSettings) -> Self {
        Self {
            threshold_ns: settings.floor_ns,
            calibrated: false,
            since_ns: None,
            updated_ns: 0,
            counted: [0; TICK_BUCKETS],
            weights: [0.0; TICK_BUCKETS],
        }
    }

    pub fn threshold_ns(&self) -> u64 {
        self.threshold_ns
    }

    /// Before that the threshold is the floor, and blocks wait for their judgement.
    pub fn is_calibrated(&self) -> bool {
        self.calibrated
    }

    /// Takes in what the loop has counted until now. `Some`: the tick length that the new threshold is a multiple of.
    pub fn update(&mut self, settings: &AdaptiveSettings, now_ns: u64, counted: &[u32; TICK_BUCKETS]) -> Option<u64> {
        let since_ns = *self.since_ns.get_or_insert(now_ns);
        let passed_ns = now_ns.saturating_sub(self.updated_ns);
        let fade = 0.5f64.powf(passed_ns as f64 / HALF_LIFE_NS);
        self.updated_ns = now_ns;
        // Until the first calibration nothing is known to be a block; the cap is one for certain.
        let block_ns = if self.calibrated { self.threshold_ns } else { settings.cap_ns };
        for (bucket, (weight, (now, before))) in
            self.weights.iter_mut().zip(counted.iter().zip(&self.counted)).enumerate()
        {
            let new = if bounds_ns(bucket).1 > block_ns as f64 { 0 } else { now.wrapping_sub(*before) };
            *weight = *weight * fade + f64::from(new);
        }
        self.counted = *counted;
        if !self.calibrated {
            let enough = self.weights.iter().sum::<f64>() >= ENOUGH_TICKS;
            if !enough && now_ns.saturating_sub(since_ns) < CALIBRATION_NS {
                return None;
            }
        }
        let baseline_ns = percentile_ns(&self.weights, settings.percentile)?;
        let wanted = (baseline_ns * settings.multiplier) as u64;
        let wanted = wanted.clamp(settings.floor_ns, settings.cap_ns.max(settings.floor_ns));
        let change = wanted.abs_diff(self.threshold_ns) as f64 / self.threshold_ns.max(1) as f64;
        let first = !std::mem::replace(&mut self.calibrated, true);
        // The ends are reached exactly.
        let at_an_end = wanted != self.threshold_ns && (wanted == settings.floor_ns || wanted == settings.cap_ns);
        if !first && change < WORTH_A_CHANGE && !at_an_end {
            return None;
        }
        self.threshold_ns = wanted;
        Some(baseline_ns as u64)
    }
}

/// The tick lengths that a bucket counts.
fn bounds_ns(bucket: usize) -> (f64, f64) {
    let upper = |bucket: usize| 1000.0 * (1u64 << bucket) as f64;
    match bucket {
        0 => (0.0, upper(0)),
        last if last + 1 == TICK_BUCKETS => (upper(last - 1), f64::INFINITY),
        bucket => (upper(bucket - 1), upper(bucket)),
    }
}

/// Within a bucket the lengths are taken as spread evenly. `None`: there are no ticks.
fn percentile_ns(weights: &[f64; TICK_BUCKETS], percentile: f64) -> Option<f64> {
    let total: f64 = weights.iter().sum();
    // What is left of a few ticks of long ago says nothing.
    if total < 0.5 {
        return None;
    }
    let mut below = total * percentile.clamp(0.0, 1.0);
    for (bucket, weight) in weights.iter().enumerate() {
        if *weight > 0.0 && below <= *weight {
            let (from, to) = bounds_ns(bucket);
            let to = if to.is_finite() { to } else { from };
            return Some(from + (to - from) * below / weight);
        }
        below -= weight;
    }
    let last = weights.iter().rposition(|weight| *weight > 0.0)?;
    Some(bounds_ns(last).0)
}

#[cfg(test)]
mod tests {
    use super::super::event::{Event, Step, StepMarks, TickCounts};
    use super::super::incident::Update;
    use super::super::profile::{Profile, Settings};
    use super::super::story::{loop_found, step};
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// A loop whose ticks are counted.
    struct Counted {
        threshold: AdaptiveThreshold,
        settings: AdaptiveSettings,
        counted: [u32; TICK_BUCKETS],
        now_ns: u64,
    }

    impl Counted {
        fn new() -> Self {
            let settings = AdaptiveSettings::default();
            let threshold = AdaptiveThreshold::new(&settings);
            Self { threshold, settings, counted: [0; TICK_BUCKETS], now_ns: 0 }
        }

        /// So many seconds with `ticks` of this length in each.
        fn run(&mut self, seconds: u64, ticks: &[(u32, u64)]) -> u64 {
            for _ in 0..seconds {
                for (count, us) in ticks {
                    let bucket = (64 - us.leading_zeros() as usize).min(TICK_BUCKETS - 1);
                    self.counted[bucket] = self.counted[bucket].wrapping_add(*count);
                }
                self.now_ns += SECOND;
                self.threshold.update(&self.settings, self.now_ns, &self.counted);
                assert!(self.threshold.threshold_ns() <= self.settings.cap_ns);
                assert!(self.threshold.threshold_ns() >= self.settings.floor_ns);
            }
            self.threshold.threshold_ns() / 1_000_000
        }
    }

    #[test]
    fn it_is_a_multiple_of_the_loops_own_ticks() {
        // 95 % of the way through the bucket of 4.1 to 8.2 ms, five times.
        assert_eq!(Counted::new().run(60, &[(100, 6000)]), 39);
    }

    #[test]
    fn a_quick_loop_has_the_floor_and_a_slow_one_the_cap() {
        assert_eq!(Counted::new().run(60, &[(1000, 200)]), 10);
        assert_eq!(Counted::new().run(60, &[(20, 80_000)]), 200);
    }

    #[test]
    fn it_follows_the_load_both_ways() {
        let mut counted = Counted::new();
        let quiet = counted.run(120, &[(50, 1500)]);
        let busy = counted.run(600, &[(200, 6000)]);
        let quiet_again = counted.run(900, &[(50, 1500)]);
        assert_eq!((quiet, busy, quiet_again), (10, 39, 10));
    }

    #[test]
    fn blocks_do_not_raise_their_own_threshold() {
        let mut counted = Counted::new();
        let before = counted.run(120, &[(100, 3000)]);
        // A bad hour: a fifth of all ticks are blocks.
        let after = counted.run(3600, &[(100, 3000), (5, 60_000), (10, 300_000), (10, 40_000)]);
        assert_eq!((before, after), (19, 19));
    }

    /// A scripted hour of one loop, told as its kernel programs would: ticks are counted, and a step is recorded only if
    /// it reaches what the profile asks for.
    struct Hour {
        profile: Profile,
        counted: [u32; TICK_BUCKETS],
        now_ns: u64,
        seq: u64,
        random: u64,
        told: Vec<u64>,
        injected: Vec<u64>,
        thresholds: Vec<u64>,
    }

    impl Hour {
        fn new() -> Self {
            let threshold = ThresholdRule::Adaptive(AdaptiveSettings::default());
            let mut profile = Profile::new(Settings { threshold, ..Settings::fixed(0) });
            profile.apply(loop_found(StepMarks::Exact));
            Self {
                profile,
                counted: [0; TICK_BUCKETS],
                now_ns: SECOND,
                seq: 0,
                random: 7,
                told: Vec::new(),
                injected: Vec::new(),
                thresholds: Vec::new(),
            }
        }

        fn random(&mut self, below: u64) -> u64 {
            self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.random >> 33) % below
        }

        fn threshold_ns(&self) -> u64 {
            self.profile.thresholds().next().unwrap().1
        }

        fn tick(&mut self, ns: u64) {
            self.counted[(64 - (ns / 1000).leading_zeros() as usize).min(TICK_BUCKETS - 1)] += 1;
            self.seq += 1;
            let asked_for_ns = self.profile.thresholds().next().unwrap().2;
            if ns >= asked_for_ns {
                let ended = Step { start_ns: self.now_ns, end_ns: self.now_ns + ns, ..step(self.seq, 0..0) };
                self.listen(Event::Step(ended));
            }
            self.now_ns += ns;
        }

        fn listen(&mut self, event: Event) {
            for update in self.profile.apply(event) {
                match update {
                    Update::Block(block) => self.told.push(block.duration_ns()),
                    Update::Threshold(change) => self.thresholds.push(change.threshold_ns),
                    _ => {}
                }
            }
        }

        /// Minutes in which each second has `ticks` of about `us`, and every `every` seconds a block of `blocks` ms.
        fn phase(&mut self, minutes: u64, (ticks, us): (u64, u64), (every, blocks): (u64, &[u64])) {
            for second in 0..minutes * 60 {
                let end_ns = self.now_ns.max(self.now_ns / SECOND * SECOND) + SECOND;
                for _ in 0..ticks {
                    let ns = (us / 2 + self.random(us)) * 1000;
                    self.tick(ns);
                }
                if second % every == every - 1 {
                    let block = blocks[self.random(blocks.len() as u64) as usize] * 1_000_000;
                    // What the threshold asks for at this moment has to be found.
                    if block >= self.threshold_ns() {
                        self.injected.push(block);
                    }
                    self.tick(block);
                }
                self.now_ns = end_ns.max(self.now_ns);
                self.listen(Event::Ticks(TickCounts { tid: 7, now_ns: self.now_ns, histogram: self.counted }));
            }
        }
    }

    #[test]
    fn a_scripted_hour() {
        let mut hour = Hour::new();
        let cap = AdaptiveSettings::default().cap_ns;
        // Blocks come from the first second on, while nothing is calibrated.
        hour.phase(10, (40, 800), (3, &[30, 250, 700]));
        let quiet = hour.threshold_ns();
        hour.phase(20, (60, 8000), (7, &[120, 300, 900]));
        let busy = hour.threshold_ns();
        // A bad time: as many blocks as anything else, of every length.
        hour.phase(15, (4, 8000), (1, &[60, 90, 150, 210, 400, 1500]));
        let bad = hour.threshold_ns();
        hour.phase(15, (40, 800), (5, &[30, 250, 700]));
        let quiet_again = hour.threshold_ns();

        assert_eq!(quiet, 10_000_000, "at the floor");
        assert!((35_000_000..=100_000_000).contains(&busy), "it follows the load: {busy}");
        assert!(bad <= busy * 3 / 2, "bad times do not raise it: {busy} to {bad}");
        assert_eq!(quiet_again, quiet, "and back");
        assert!(hour.thresholds.iter().all(|ns| *ns <= cap), "{:?}", hour.thresholds);
        assert!(hour.injected.len() > 500, "{}", hour.injected.len());
        // Held ones come late: compared without order.
        hour.injected.sort_unstable();
        let mut told = hour.told.clone();
        told.sort_unstable();
        for block in &hour.injected {
            let found = told.iter().position(|told| told == block);
            assert!(found.is_some(), "a block of {block} ns was not told");
            told.remove(found.unwrap_or_default());
        }
    }

    #[test]
    fn a_loop_that_hardly_ticks_is_judged_after_a_while() {
        let mut counted = Counted::new();
        counted.run(29, &[(1, 3000)]);
        assert!(!counted.threshold.is_calibrated());
        counted.run(2, &[(1, 3000)]);
        assert!(counted.threshold.is_calibrated());
    }

    #[test]
    fn counters_may_wrap_and_a_silent_loop_keeps_its_threshold() {
        let mut counted = Counted::new();
        counted.counted[13] = u32::MAX - 5;
        counted.threshold.counted = counted.counted;
        assert_eq!(counted.run(120, &[(100, 6000)]), 39);
        assert_eq!(counted.run(100_000, &[]), 39);
    }
}
