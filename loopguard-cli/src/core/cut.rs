//! Cuts a step into parts of one owner each, by the captures taken in it.

use super::event::{Capture, OffCpu, Owner};

/// A stretch of one thread's time, and where its off-CPU part went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub start_ns: u64,
    pub end_ns: u64,
    pub off_cpu: OffCpu,
}

impl Span {
    pub fn duration_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.start_ns)
    }
}

/// A span and the captures taken in it.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    pub span: Span,
    pub captures: &'a [Capture],
}

/// Puts captures in order of time and inside `span`, one after the other without overlap.
pub fn settle(captures: &mut [Capture], span: &Span) {
    captures.sort_by_key(|capture| capture.at_ns);
    let mut earliest = span.start_ns;
    let latest = span.end_ns.max(span.start_ns);
    for capture in captures {
        capture.at_ns = capture.at_ns.clamp(earliest, latest);
        capture.until_ns = capture.until_ns.clamp(capture.at_ns, latest);
        earliest = capture.until_ns;
    }
}

/// Cuts `span` half way between neighbouring captures of different owners. The parts follow each other without gaps
/// and sum to the whole. A capture without a known owner between two of the same owner belongs to that owner.
///
/// `captures` are [settled](settle).
pub fn by_owner<'a>(span: &Span, captures: &'a [Capture]) -> Vec<Part<'a>> {
    let runs = runs_of_one_owner(captures);
    let off_cpu = OffCpuCurve::new(span, captures);
    let mut parts = Vec::with_capacity(runs.len().max(1));
    let (mut start_ns, mut off_before) = (span.start_ns, OffCpu::default());
    for (index, run) in runs.iter().enumerate() {
        let is_last = index + 1 == runs.len();
        let (end_ns, off_after) = if is_last {
            (span.end_ns, span.off_cpu)
        } else {
            let cut = midpoint(captures[run.last].until_ns, captures[run.last + 1].at_ns);
            (cut, off_cpu.at(cut))
        };
        let span = Span { start_ns, end_ns, off_cpu: minus(off_after, off_before) };
        parts.push(Part { span, captures: &captures[run.first..=run.last] });
        (start_ns, off_before) = (end_ns, off_after);
    }
    if parts.is_empty() {
        parts.push(Part { span: *span, captures });
    }
    parts
}

/// Whether two captures saw the code of the same owner. The same request may be known better in a later capture (its
/// route, say), so what identifies it is compared, not all that is known of it.
pub fn same_owner(a: &Owner, b: &Owner) -> bool {
    match (a, b) {
        (Owner::Request { request: a, .. }, Owner::Request { request: b, .. }) => a.id == b.id && a.path == b.path,
        (Owner::NoRequest { task: a }, Owner::NoRequest { task: b }) => a == b,
        (Owner::Task { task: a }, Owner::Task { task: b }) => a == b,
        (Owner::NoRequest { task: Some(a) }, Owner::Task { task: b })
        | (Owner::Task { task: b }, Owner::NoRequest { task: Some(a) }) => a == b,
        (Owner::Unknown(_), Owner::Unknown(_)) => true,
        _ => false,
    }
}

/// Indices of the first and last capture of a run.
#[derive(Clone, Copy)]
struct Run {
    first: usize,
    last: usize,
}

fn runs_of_one_owner(captures: &[Capture]) -> Vec<Run> {
    let owner = |run: &Run| &captures[run.first].owner;
    let mut runs: Vec<Run> = Vec::new();
    for (index, capture) in captures.iter().enumerate() {
        match runs.as_mut_slice() {
            [.., current] if same_owner(owner(current), &capture.owner) => current.last = index,
            [.., before, between]
                if matches!(owner(between), Owner::Unknown(_)) && same_owner(owner(before), &capture.owner) =>
            {
                before.last = index;
                runs.pop();
            }
            _ => runs.push(Run { first: index, last: index }),
        }
    }
    runs
}

/// How the off-CPU totals grew over a span: the totals at the instants where they are known, in order.
struct OffCpuCurve {
    known: Vec<(u64, OffCpu)>,
}

impl OffCpuCurve {
    fn new(span: &Span, captures: &[Capture]) -> Self {
        let mut known = vec![(span.start_ns, OffCpu::default())];
        let mut before = OffCpu::default();
        for capture in captures {
            let after = each([before, capture.off_cpu, span.off_cpu], |[low, x, high]| x.max(low).min(high.max(low)));
            // The whole of a wait was off the CPU; only what is left of the growth came before it.
            let growth = minus(after, before);
            let in_wait = u128::from(capture.until_ns - capture.at_ns).min(total(growth));
            let growth_before = each([growth], |[ns]| scaled(ns, total(growth) - in_wait, total(growth)));
            known.push((capture.at_ns, each([before, growth_before], |[a, b]| a.saturating_add(b))));
            known.push((capture.until_ns, after));
            before = after;
        }
        known.push((span.end_ns, span.off_cpu));
        Self { known }
    }

    fn at(&self, ns: u64) -> OffCpu {
        let next = self.known.partition_point(|(known_ns, _)| *known_ns <= ns).clamp(1, self.known.len() - 1);
        let ((from_ns, from), (to_ns, to)) = (self.known[next - 1], self.known[next]);
        let (passed, length) = (ns.saturating_sub(from_ns), to_ns.saturating_sub(from_ns));
        each([from, to], |[from, to]| from + scaled(to.saturating_sub(from), passed.min(length).into(), length.into()))
    }
}

fn midpoint(a: u64, b: u64) -> u64 {
    a.midpoint(b)
}

/// `ns * part / whole`, for a part not above the whole; nothing of nothing.
pub(super) fn scaled(ns: u64, part: u128, whole: u128) -> u64 {
    u128::from(ns).saturating_mul(part).checked_div(whole).unwrap_or(0) as u64
}

pub(super) fn total(off_cpu: OffCpu) -> u128 {
    u128::from(off_cpu.waiting_ns) + u128::from(off_cpu.gil_ns) + u128::from(off_cpu.run_queue_ns)
}

fn minus(a: OffCpu, b: OffCpu) -> OffCpu {
    each([a, b], |[a, b]| a.saturating_sub(b))
}

/// Computes every component of the result from the same component of the inputs.
pub(super) fn each<const N: usize>(inputs: [OffCpu; N], f: impl Fn([u64; N]) -> u64) -> OffCpu {
    OffCpu {
        waiting_ns: f(inputs.map(|off_cpu| off_cpu.waiting_ns)),
        gil_ns: f(inputs.map(|off_cpu| off_cpu.gil_ns)),
        run_queue_ns: f(inputs.map(|off_cpu| off_cpu.run_queue_ns)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::story::{ms, sample, wait};
    use super::*;

    fn off(waiting_ms: u64) -> OffCpu {
        OffCpu { waiting_ns: ms(waiting_ms), ..OffCpu::default() }
    }

    /// Renders the parts as `start..end owner waiting`, in milliseconds.
    fn check(span: (u64, u64, u64), mut captures: Vec<Capture>, expected: &[&str]) {
        let span = Span { start_ns: ms(span.0), end_ns: ms(span.1), off_cpu: off(span.2) };
        settle(&mut captures, &span);
        let parts: Vec<String> = by_owner(&span, &captures)
            .iter()
            .map(|part| {
                let owner = match part.captures.first().map(|capture| &capture.owner) {
                    Some(Owner::Request { request, .. }) => &request.id,
                    Some(Owner::NoRequest { .. } | Owner::Task { .. }) => "-",
                    Some(Owner::Unknown(_)) => "?",
                    None => "nothing",
                };
                let [start, end, waiting] =
                    [part.span.start_ns, part.span.end_ns, part.span.off_cpu.waiting_ns].map(|ns| ns as f64 / 1e6);
                format!("{start}..{end} {owner} {waiting}")
            })
            .collect();
        assert_eq!(parts, expected);
    }

    #[test]
    fn without_captures_there_is_one_part() {
        check((0, 30, 4), vec![], &["0..30 nothing 4"]);
    }

    #[test]
    fn owners_are_cut_at_the_midpoint() {
        check(
            (0, 30, 0),
            vec![sample(1, 5, "A"), sample(1, 10, "A"), sample(1, 16, "B")],
            &["0..13 A 0", "13..30 B 0"],
        );
    }

    #[test]
    fn a_wait_belongs_to_the_part_it_happened_in() {
        let mut waiting = wait(1, 8..28, "B recvfrom");
        waiting.off_cpu = off(20);
        check((0, 30, 20), vec![sample(1, 4, "A"), waiting], &["0..6 A 0", "6..30 B 20"]);
    }

    #[test]
    fn waits_between_captures_are_spread_evenly() {
        let (a, mut b) = (sample(1, 10, "A"), sample(1, 20, "B"));
        b.off_cpu = off(4);
        check((0, 30, 4), vec![a, b], &["0..15 A 2", "15..30 B 2"]);
    }

    #[test]
    fn unknown_joins_only_its_own_neighbours() {
        let seen = |owners: &[&str]| owners.iter().zip(1..).map(|(owner, i)| sample(1, 2 * i, owner)).collect();
        check((0, 9, 0), seen(&["A", "?", "?", "A"]), &["0..9 A 0"]);
        check((0, 9, 0), seen(&["A", "?", "A", "?"]), &["0..7 A 0", "7..9 ? 0"]);
        check((0, 9, 0), seen(&["A", "?", "B"]), &["0..3 A 0", "3..5 ? 0", "5..9 B 0"]);
        check((0, 9, 0), seen(&["?", "-", "?", "-"]), &["0..3 ? 0", "3..9 - 0"]);
    }

    #[test]
    fn a_task_is_the_same_before_and_after_requests_were_known() {
        check((0, 6, 0), vec![sample(1, 2, "-job?"), sample(1, 4, "-job")], &["0..6 - 0"]);
        check((0, 6, 0), vec![sample(1, 2, "-job?"), sample(1, 4, "-other")], &["0..3 - 0", "3..6 - 0"]);
    }

    #[test]
    fn captures_out_of_order_and_outside_are_put_right() {
        check((10, 30, 0), vec![sample(1, 50, "B"), sample(1, 2, "A")], &["10..20 A 0", "20..30 B 0"]);
    }
}
