//! Turns many steps below the threshold into one incident when they add up: death by a thousand cuts.
//!
//! A step counts from a floor on, and with the time it held the loop by its own doing: time it was ready to run without
//! a CPU is the machine's. Two things can add up within the window. One owner's steps: then that owner is named. Or, of
//! what is left of those a window later, the steps of several owners together: then the loop as a whole is named, with
//! the main ones and their shares. So a step is part of one episode at most.

use std::collections::VecDeque;
use std::sync::Arc;

use super::cut::same_owner;
use super::event::{LoopInfo, Owner, Stack};
use super::hint;
use super::incident::{Attribution, Blame, Cumulative, LineShare, OwnerShare, Split, WaitTotal, user_line};

/// Steps of one loop that are remembered; two windows at the default floor hold 400.
const MAX_RECENT: usize = 2048;
/// Owners and lines that an episode keeps apart; the time of the rest counts in its total only.
const MAX_SHARES: usize = 32;
/// An episode is over when less than this part of its threshold is left in the window.
const OVER_BELOW: u64 = 4;
/// An episode that goes on is told when it is this old, then each time its age has doubled.
const ONGOING_AFTER_NS: u64 = 2_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CumulativeSettings {
    /// Steps within so long
    pub window_ns: u64,
    /// that sum up to this are a cumulative block.
    pub threshold_ns: u64,
    /// Shorter steps don't count.
    pub floor_ns: u64,
}

impl Default for CumulativeSettings {
    fn default() -> Self {
        Self { window_ns: 1_000_000_000, threshold_ns: 200_000_000, floor_ns: 5_000_000 }
    }
}

impl CumulativeSettings {
    /// The floor for a loop whose blocks begin at `threshold_ns`: there must be room between the two.
    pub fn floor_ns(&self, threshold_ns: u64) -> u64 {
        self.floor_ns.min(threshold_ns / 2)
    }
}

/// A step below the threshold, and whose it was.
#[derive(Clone, Debug)]
pub struct ShortStep {
    pub start_ns: u64,
    pub end_ns: u64,
    pub split: Split,
    pub waits: Vec<WaitTotal>,
    pub blame: Blame,
}

impl ShortStep {
    /// How long it held the loop by its own doing.
    pub fn own_ns(&self) -> u64 {
        self.split.total_ns().saturating_sub(self.split.run_queue_ns)
    }
}

/// An episode that has ended, or is told because it goes on.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    Ended(Cumulative),
    GoesOn(Cumulative),
}

/// The short steps of one loop.
#[derive(Debug, Default)]
pub struct ShortSteps {
    recent: VecDeque<Recent>,
    episodes: Vec<Episode>,
}

#[derive(Debug)]
struct Recent {
    step: ShortStep,
    place: Place,
}

/// Where a step counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// An episode of its owner may still take it.
    Open,
    /// In an episode of its owner.
    Own,
    /// No episode of its owner took it in time.
    LeftOver,
    /// In an episode of the loop as a whole.
    Together,
}

#[derive(Debug)]
struct Episode {
    whose: Whose,
    start_ns: u64,
    end_ns: u64,
    split: Split,
    count: u64,
    waits: Vec<WaitTotal>,
    owners: Vec<OwnerShare>,
    lines: Vec<LineShare>,
    tell_at_ns: u64,
}

#[derive(Clone, Debug)]
enum Whose {
    One(Owner),
    /// What no owner's own episode took.
    Several,
}

impl ShortSteps {
    /// A step that is below the threshold and above the floor has ended.
    pub fn add(&mut self, on: &Arc<LoopInfo>, settings: &CumulativeSettings, step: ShortStep) -> Vec<Told> {
        let now = step.end_ns;
        let told = self.pass(on, settings, now);
        if self.recent.len() == MAX_RECENT {
            self.recent.pop_front();
        }
        let owner = step.blame.owner.clone();
        self.recent.push_back(Recent { step, place: Place::Open });
        // Nobody's steps can be told from another nobody's: they add up with the rest only.
        if matches!(owner, Owner::Unknown(_)) {
            return told;
        }
        let since = now.saturating_sub(settings.window_ns);
        let index = match self.episodes.iter().position(|episode| episode.is_of(&owner)) {
            Some(index) => index,
            None => {
                let of_owner = self.recent.iter().filter(|recent| recent.is_open_to(&owner, since));
                if of_owner.map(|recent| recent.step.own_ns()).sum::<u64>() < settings.threshold_ns {
                    return told;
                }
                self.episodes.push(Episode::new(Whose::One(owner.clone())));
                self.episodes.len() - 1
            }
        };
        let episode = &mut self.episodes[index];
        for recent in self.recent.iter_mut().filter(|recent| recent.is_open_to(&owner, since)) {
            recent.place = Place::Own;
            episode.take(&recent.step);
        }
        told
    }

    /// Time has passed: ends the episodes in whose window little is left, and looks at what is left over.
    pub fn pass(&mut self, on: &Arc<LoopInfo>, settings: &CumulativeSettings, now_ns: u64) -> Vec<Told> {
        let window = settings.window_ns;
        self.pool(settings, now_ns.saturating_sub(window));
        let mut told = Vec::new();
        let recent = &self.recent;
        self.episodes.retain_mut(|episode| {
            let (since, until) = match episode.whose {
                Whose::One(_) => (now_ns.saturating_sub(window), now_ns),
                // It lags a window behind.
                Whose::Several => (now_ns.saturating_sub(2 * window), now_ns.saturating_sub(window)),
            };
            let left: u64 = recent
                .iter()
                .filter(|recent| (since + 1..=until).contains(&recent.step.end_ns) && episode.holds(recent))
                .map(|recent| recent.step.own_ns())
                .sum();
            if left < settings.threshold_ns / OVER_BELOW {
                told.push(Told::Ended(episode.tell(on, settings)));
                return false;
            }
            let age = now_ns.saturating_sub(episode.start_ns);
            if age >= episode.tell_at_ns {
                episode.tell_at_ns = age.saturating_mul(2);
                told.push(Told::GoesOn(episode.tell(on, settings)));
            }
            true
        });
        while self.recent.front().is_some_and(|recent| recent.step.end_ns < now_ns.saturating_sub(2 * window)) {
            self.recent.pop_front();
        }
        told
    }

    /// Whatever is under way ends now.
    pub fn finish(&mut self, on: &Arc<LoopInfo>, settings: &CumulativeSettings) -> Vec<Told> {
        self.recent.clear();
        std::mem::take(&mut self.episodes).iter().map(|episode| Told::Ended(episode.tell(on, settings))).collect()
    }

    /// Steps that ended by `until_ns` and that no owner's episode took by now belong to the loop as a whole.
    fn pool(&mut self, settings: &CumulativeSettings, until_ns: u64) {
        for next in 0..self.recent.len() {
            let Recent { step, place } = &mut self.recent[next];
            if *place != Place::Open || step.end_ns > until_ns {
                continue;
            }
            *place = Place::LeftOver;
            let since = step.end_ns.saturating_sub(settings.window_ns);
            let left_over = |recent: &&mut Recent| recent.place == Place::LeftOver && recent.step.end_ns > since;
            let open = self.episodes.iter().position(|episode| matches!(episode.whose, Whose::Several));
            let index = open.or_else(|| {
                let sum: u64 = self.recent.iter_mut().filter(left_over).map(|recent| recent.step.own_ns()).sum();
                (sum >= settings.threshold_ns).then(|| {
                    self.episodes.push(Episode::new(Whose::Several));
                    self.episodes.len() - 1
                })
            });
            let Some(index) = index else { continue };
            for recent in self.recent.iter_mut().filter(left_over) {
                recent.place = Place::Together;
                self.episodes[index].take(&recent.step);
            }
        }
    }
}

impl Recent {
    fn is_open_to(&self, owner: &Owner, since_ns: u64) -> bool {
        self.place == Place::Open && self.step.end_ns > since_ns && same_owner(&self.step.blame.owner, owner)
    }
}

impl Episode {
    fn new(whose: Whose) -> Self {
        Self {
            whose,
            start_ns: u64::MAX,
            end_ns: 0,
            split: Split::default(),
            count: 0,
            waits: Vec::new(),
            owners: Vec::new(),
            lines: Vec::new(),
            tell_at_ns: ONGOING_AFTER_NS,
        }
    }

    fn is_of(&self, owner: &Owner) -> bool {
        matches!(&self.whose, Whose::One(own) if same_owner(own, owner))
    }

    fn holds(&self, recent: &Recent) -> bool {
        match &self.whose {
            Whose::One(owner) => recent.place == Place::Own && same_owner(owner, &recent.step.blame.owner),
            Whose::Several => recent.place == Place::Together,
        }
    }

    fn take(&mut self, step: &ShortStep) {
        self.start_ns = self.start_ns.min(step.start_ns);
        self.end_ns = self.end_ns.max(step.end_ns);
        self.split = self.split.plus(&step.split);
        self.count += 1;
        for wait in &step.waits {
            let is_known = |known: &&mut WaitTotal| known.syscall == wait.syscall && known.on == wait.on;
            if let Some(known) = self.waits.iter_mut().find(is_known) {
                known.ns += wait.ns;
            } else if self.waits.len() < MAX_SHARES {
                self.waits.push(wait.clone());
            }
        }
        let ns = step.split.total_ns();
        let Blame { owner, attribution, stack } = &step.blame;
        if let Some(known) = self.owners.iter_mut().find(|known| same_owner(&known.owner, owner)) {
            known.ns += ns;
            known.count += 1;
            known.attribution = weaker(known.attribution, *attribution);
            // The same request, known better: its route was found later.
            if knows_route(owner) && !knows_route(&known.owner) {
                known.owner = owner.clone();
            }
        } else if self.owners.len() < MAX_SHARES {
            self.owners.push(OwnerShare { owner: owner.clone(), attribution: *attribution, ns, count: 1 });
        }
        if let Some(known) = self.lines.iter_mut().find(|known| is_same_line(&known.stack, stack)) {
            known.ns += ns;
            known.count += 1;
        } else if self.lines.len() < MAX_SHARES {
            self.lines.push(LineShare { stack: Arc::clone(stack), ns, count: 1 });
        }
    }

    fn tell(&self, on: &Arc<LoopInfo>, settings: &CumulativeSettings) -> Cumulative {
        let (mut owners, mut lines) = (self.owners.clone(), self.lines.clone());
        owners.sort_by_key(|share| std::cmp::Reverse(share.ns));
        lines.sort_by_key(|share| std::cmp::Reverse(share.ns));
        let mut waits = self.waits.clone();
        waits.sort_by_key(|wait| std::cmp::Reverse(wait.ns));
        let main = owners.first();
        let stack = lines.iter().find(|line| !line.stack.frames.is_empty()).or(lines.first());
        let blame = Blame {
            owner: main.map_or(Owner::Unknown("nothing was captured while it ran"), |share| share.owner.clone()),
            attribution: owners.iter().map(|share| share.attribution).reduce(weaker).unwrap_or(Attribution::Unknown),
            stack: stack.map(|line| Arc::clone(&line.stack)).unwrap_or_default(),
        };
        Cumulative {
            on: Arc::clone(on),
            start_ns: self.start_ns,
            end_ns: self.end_ns,
            window_ns: settings.window_ns,
            threshold_ns: settings.threshold_ns,
            total_ns: self.split.total_ns(),
            count: self.count,
            split: self.split,
            hint: hint::hint(&blame, &self.split, &waits),
            waits,
            blame,
            owners,
            lines,
        }
    }
}

fn weaker(a: Attribution, b: Attribution) -> Attribution {
    let rank = |attribution| match attribution {
        Attribution::Exact => 2,
        Attribution::Inferred => 1,
        Attribution::Unknown => 0,
    };
    if rank(b) < rank(a) { b } else { a }
}

fn knows_route(owner: &Owner) -> bool {
    matches!(owner, Owner::Request { request, .. } if request.route.is_some())
}

fn is_same_line(a: &Stack, b: &Stack) -> bool {
    match (user_line(a), user_line(b)) {
        (Some(a), Some(b)) => a.frame == b.frame && a.called.map(|f| &f.function) == b.called.map(|f| &f.function),
        (None, None) => a.frames.first() == b.frames.first(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::event::{Event, StepMarks};
    use super::super::story::{check, loop_found, ms, profile, sample, step, tick, waited};
    use super::*;
    use StepMarks::Exact;

    /// `count` steps of `length` ms every `every` ms from `from` on, each of the owner and stack `seen`.
    fn cuts(seq: u64, from: u64, (count, length, every): (u64, u64, u64), seen: &str) -> Vec<Event> {
        (0..count)
            .flat_map(|index| {
                let start = from + index * every;
                [sample(seq + index, start + 3, seen).into(), step(seq + index, start..start + length).into()]
            })
            .collect()
    }

    fn time(ms_now: u64) -> Event {
        Event::TimePassed { now_ns: ms(ms_now) }
    }

    #[test]
    fn many_short_steps_of_one_request_are_one_block() {
        let mut story = cuts(1, 1000, (40, 8, 9), "A grind < handler");
        story.push(time(4000));
        check(Exact, story, &["1000..1359 cumulative A Exact | 40 x 320 | A 320 | grind 320"]);
    }

    #[test]
    fn an_episode_is_told_when_it_is_over_and_only_then() {
        let mut story = cuts(1, 1000, (40, 8, 9), "A grind");
        story.push(time(2200));
        check(Exact, story.clone(), &[]);
        story.push(time(2300));
        story.push(time(2400));
        check(Exact, story, &["1000..1359 cumulative A Exact | 40 x 320 | A 320 | grind 320"]);
    }

    #[test]
    fn below_the_threshold_or_the_floor_or_too_far_apart_is_nothing() {
        let and_later = |mut story: Vec<Event>| {
            story.push(time(60_000));
            story
        };
        check(Exact, and_later(cuts(1, 1000, (24, 8, 9), "A")), &[]);
        check(Exact, and_later(cuts(1, 1000, (500, 4, 5), "A")), &[]);
        check(Exact, and_later(cuts(1, 1000, (200, 8, 50), "A")), &[]);
    }

    #[test]
    fn time_without_a_cpu_is_not_the_loops_doing() {
        let story = (0..300).map(|index| {
            let start = 1000 + index * 10;
            Event::from(super::super::event::Step { off_cpu: waited([0, 0, 6]), ..step(index, start..start + 9) })
        });
        check(Exact, story.chain([time(60_000)]), &[]);
    }

    #[test]
    fn two_requests_in_turn_are_told_apart() {
        let mut story = Vec::new();
        for index in 0..60 {
            let (start, who) = (1000 + index * 9, if index % 2 == 0 { "A one" } else { "B two" });
            story.push(sample(index, start + 3, who).into());
            story.push(step(index, start..start + 8).into());
        }
        story.push(time(9000));
        check(
            Exact,
            story,
            &[
                "1000..1530 cumulative A Exact | 30 x 240 | A 240 | one 240",
                "1009..1539 cumulative B Exact | 30 x 240 | B 240 | two 240",
            ],
        );
    }

    #[test]
    fn many_requests_with_a_step_each_are_the_loops_episode() {
        let mut story = Vec::new();
        for index in 0..40 {
            let start = 1000 + index * 20;
            story.push(sample(index, start + 3, &format!("r{} render", index % 10)).into());
            story.push(step(index, start..start + 8).into());
        }
        story.push(time(9000));
        let shares = (0..10).map(|index| format!("r{index} 32")).collect::<Vec<_>>().join(", ");
        let expected = format!("1000..1788 cumulative r0 Exact | 40 x 320 | {shares} | render 320");
        check(Exact, story, &[&expected]);
    }

    #[test]
    fn what_an_owners_episode_took_is_not_counted_twice() {
        let mut story = cuts(100, 1000, (40, 8, 20), "A grind");
        for index in 0..10 {
            let start = 1010 + index * 40;
            story.push(sample(index, start + 3, &format!("r{index} render")).into());
            story.push(step(index, start..start + 8).into());
        }
        story.sort_by_key(|event| match event {
            Event::Step(step) => step.end_ns,
            Event::Capture(capture) => capture.at_ns,
            _ => 0,
        });
        // Sequence numbers grow with time.
        let mut seq = 0;
        for event in &mut story {
            match event {
                Event::Capture(capture) => {
                    seq += 1;
                    capture.step_seq = seq;
                }
                Event::Step(step) => step.seq = seq,
                _ => {}
            }
        }
        story.push(time(9000));
        check(Exact, story, &["1000..1788 cumulative A Exact | 40 x 320 | A 320 | grind 320"]);
    }

    #[test]
    fn unknown_owners_add_up_as_the_loops_own() {
        let story = (0..40).map(|index| step(index, 1000 + index * 9..1008 + index * 9).into());
        check(Exact, story.chain([time(9000)]), &["1000..1359 cumulative ? Unknown | 40 x 320 | ? 320 | ? 320"]);
    }

    #[test]
    fn a_part_of_a_tick_is_a_short_step_too() {
        let mut story = Vec::new();
        for index in 0..40 {
            let start = 1000 + index * 30;
            // Two owners, 9 and 9 ms.
            story.push(sample(index, start + 6, "A work").into());
            story.push(sample(index, start + 12, "B work").into());
            story.push(tick(index, start..start + 18).into());
        }
        story.push(time(9000));
        check(
            StepMarks::TicksOnly,
            story,
            &[
                "1000..2179 cumulative A Inferred | 40 x 360 | A 360 | work 360",
                "1009..2188 cumulative B Inferred | 40 x 360 | B 360 | work 360",
            ],
        );
    }

    #[test]
    fn what_goes_on_is_told_on_the_way_and_once_as_a_block() {
        let story = cuts(1, 0, (1000, 8, 10), "-sweep tidy").into_iter().chain([time(12_000)]);
        check(
            Exact,
            story,
            &[
                "0.. cumulative -sweep Exact | 200 x 1600",
                "0.. cumulative -sweep Exact | 401 x 3208",
                "0.. cumulative -sweep Exact | 803 x 6424",
                "0..9998 cumulative -sweep Exact | 1000 x 8000 | -sweep 8000 | tidy 8000",
            ],
        );
    }

    #[test]
    fn the_end_of_the_watch_ends_every_episode() {
        let mut profile = profile(Exact, 10);
        profile.apply(loop_found(Exact));
        let told: usize = cuts(1, 1000, (40, 8, 9), "A").into_iter().map(|event| profile.apply(event).len()).sum();
        assert_eq!((told, profile.finish().len(), profile.finish().len()), (0, 1, 0));
    }

    #[test]
    fn memory_is_bounded() {
        let mut steps = ShortSteps::default();
        let Event::LoopFound(info) = loop_found(Exact) else { unreachable!() };
        let (info, settings) = (Arc::new(info), CumulativeSettings::default());
        for index in 0..6_000 {
            let captured = sample(index, 0, &format!("r{index} f{index}"));
            let blame =
                Blame { owner: captured.owner, attribution: Attribution::Exact, stack: Arc::clone(&captured.stack) };
            let split = Split { on_cpu_ns: ms(8), ..Split::default() };
            // All at once, as a broken clock has it.
            steps.add(&info, &settings, ShortStep { start_ns: ms(5), end_ns: ms(13), split, waits: Vec::new(), blame });
        }
        assert!(steps.recent.len() <= MAX_RECENT);
        assert!(steps.episodes.iter().all(|episode| episode.owners.len() <= MAX_SHARES));
    }
}
