"""Compares what a tool reported with what the server did. usage: score.py TRUTH.jsonl REPORTED.jsonl [--wrong FILE]

Prints one JSON object; `reported` is in the form of loopguard's JSON lines. Definitions:

A true block is an uninterrupted stretch of the loop's thread of 3 ms or more that belongs to one owner: a step of a
request's own task, or a deliberate block outside of such a step (child tasks, streamed bodies, the background task,
which no request owns). Two blocks in the same step are one.

At a threshold T, only reports of single blocks of at least T count. A true block between 0.8 T and 1.25 T may be
reported or not: it counts neither as missed nor as wrong.

recall                 of the true blocks of 1.25 T or more: how many have at least half of their time inside reports
recall_one_to_one      of the same blocks: how many are paired, as below, with a report of their own: where two loops
                       block at once, a report of the other one does not count
precision              of the reports: how many can be paired with a true block of 0.8 T or more. Each true block pairs
                       with one report at most, the largest overlap first; 2 ms between their edges are forgiven
invented               of the reports: how many are to more than half no true block of any length
duration_error_ms      over those pairs: the difference between reported and true duration, median and 95th percentile
attribution_precision  of the requests blamed by reports: how many own a true block that overlaps the report by 1 ms
attribution_recall     of the true blocks of 1.25 T or more that a request owns: how many have their owner blamed by a
                       report that overlaps them. A block that was not found counts as missed
blamed_per_report      requests blamed by one report, on average
background_blamed      of the background task's blocks that were found: how many are charged to innocent requests by
                       every report that overlaps them

With --wrong the reports that count against precision or attribution precision at 10 ms are written to a file as they
were reported.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

MS = 1e6
SHORTEST_NS = 3 * MS
FORGIVEN_NS = 2 * MS
THRESHOLDS_MS = (50, 10)


@dataclass(frozen=True)
class Block:
    """What the server did; `owner` None: the background task."""

    start: int
    end: int
    owner: str | None

    @property
    def ms(self) -> float:
        return (self.end - self.start) / MS


@dataclass
class Report:
    start: int
    end: int
    ms: float
    blamed: frozenset[str]
    line: str
    # True blocks that it touches, by index.
    touches: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Truth:
    """What ran before `begin`, the load's first request, or after `last`, its last answer, does not count."""

    begin: int
    last: int
    requests: int
    blocks: list[Block]


def is_within(start: int, end: int, begin: int, last: int) -> bool:
    """Whether something counts, by the same measure for what happened and for what was reported."""
    return begin - FORGIVEN_NS <= start and end <= last + FORGIVEN_NS


def read_truth(path: Path) -> Truth:
    requests, blocks = 0, []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    measured = [line for line in lines if line["type"] == "request" and line["request_id"] not in (None, "warm-up")]
    begin = min(line["start_ns"] for line in measured)
    # After the load the tool is ended, a moment before the server.
    last = max(line["end_ns"] for line in measured)
    for line in measured:
        requests += 1
        stretches = [(start, end) for start, end in line["steps"]]
        for start, end, _ in line["spans"]:
            if not any(step[0] <= start and end <= step[1] for step in stretches):
                stretches.append((start, end))
        blocks += [Block(start, end, line["request_id"]) for start, end in stretches]
    for line in lines:
        if line["type"] == "background":
            blocks += [Block(start, end, None) for start, end, _ in line["spans"] if is_within(start, end, begin, last)]
    long = [block for block in blocks if block.end - block.start >= SHORTEST_NS]
    return Truth(begin, last, requests, sorted(long, key=lambda block: block.start))


def read_reports(path: Path, truth: Truth) -> list[Report]:
    reports = []
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if event["type"] != "block" or event["event"] != "single":
            continue
        if not is_within(event["t_start_ns"], event["t_end_ns"], truth.begin, truth.last):
            continue
        blamed = frozenset(request["id"] for request in event["requests"])
        reports.append(Report(event["t_start_ns"], event["t_end_ns"], event["duration_ms"], blamed, line))
    return reports


def overlap(report: Report, block: Block) -> int:
    return min(report.end, block.end) - max(report.start, block.start)


def covered(block: Block, reports: list[Report]) -> bool:
    total, reached = 0, block.start
    for report in sorted(reports, key=lambda report: report.start):
        start, end = max(report.start, reached), min(report.end, block.end)
        if end > start:
            total += end - start
            reached = end
    return total * 2 >= block.end - block.start


def pairs(reports: list[Report], blocks: list[Block]) -> list[tuple[Report, Block]]:
    candidates = [
        (overlap(report, blocks[at]), number, at) for number, report in enumerate(reports) for at in report.touches
    ]
    used_reports: set[int] = set()
    used_blocks: set[int] = set()
    paired = []
    for _, number, at in sorted(candidates, reverse=True):
        if number not in used_reports and at not in used_blocks:
            used_reports.add(number)
            used_blocks.add(at)
            paired.append((reports[number], blocks[at]))
    return paired


def share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def percentile(values: list[float], rank: float) -> float | None:
    return round(sorted(values)[min(len(values) - 1, int(len(values) * rank))], 3) if values else None


def culprits(report: Report, blocks: list[Block]) -> set[str | None]:
    return {blocks[at].owner for at in report.touches if overlap(report, blocks[at]) >= MS}


def wrong(threshold: float, blocks: list[Block], reports: list[Report]) -> list[Report]:
    counted = [report for report in reports if report.ms >= threshold]
    right = [report for report, block in pairs(counted, blocks) if block.ms >= 0.8 * threshold]
    return [report for report in counted if report not in right or report.blamed - culprits(report, blocks)]


def at_threshold(threshold: float, blocks: list[Block], reports: list[Report]) -> dict[str, float | int | None]:
    counted = [report for report in reports if report.ms >= threshold]
    over: dict[int, list[Report]] = {at: [] for at in range(len(blocks))}
    for report in reports:
        for at in report.touches:
            if overlap(report, blocks[at]) > 0:
                over[at].append(report)
    required = [at for at, block in enumerate(blocks) if block.ms >= 1.25 * threshold]
    found = [at for at in required if covered(blocks[at], over[at])]
    paired = [(report, block) for report, block in pairs(counted, blocks) if block.ms >= 0.8 * threshold]
    required_paired = [block for _, block in paired if block.ms >= 1.25 * threshold]
    errors = [abs(report.ms - block.ms) for report, block in paired]
    invented = blamed = rightly = 0
    for report in counted:
        real = sum(max(0, overlap(report, blocks[at])) for at in report.touches)
        invented += real * 2 < report.end - report.start
        blamed += len(report.blamed)
        rightly += len(report.blamed & culprits(report, blocks))
    owned = [at for at in required if blocks[at].owner is not None]
    named = [at for at in owned if any(blocks[at].owner in report.blamed for report in over[at])]
    background = [at for at in found if blocks[at].owner is None]
    charged = [at for at in background if all(report.blamed for report in over[at])]
    return {
        "true_blocks": len(required),
        "reports": len(counted),
        "recall": share(len(found), len(required)),
        "recall_one_to_one": share(len(required_paired), len(required)),
        "precision": share(len(paired), len(counted)),
        "invented": share(invented, len(counted)),
        "duration_error_ms_median": round(statistics.median(errors), 3) if errors else None,
        "duration_error_ms_p95": percentile(errors, 0.95),
        "attribution_precision": share(rightly, blamed),
        "attribution_recall": share(len(named), len(owned)),
        "blamed_per_report": share(blamed, len(counted)),
        "background_found": len(background),
        "background_blamed": share(len(charged), len(background)),
    }


def score(truth: Truth, reports: list[Report]) -> dict[str, object]:
    for report in reports:
        report.touches = [at for at, block in enumerate(truth.blocks) if overlap(report, block) >= -FORGIVEN_NS]
    return {
        "requests": truth.requests,
        "true_blocks": len(truth.blocks),
        **{f"at_{threshold}ms": at_threshold(threshold, truth.blocks, reports) for threshold in THRESHOLDS_MS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", type=Path)
    parser.add_argument("reported", type=Path)
    parser.add_argument("--wrong", type=Path)
    arguments = parser.parse_args()
    truth = read_truth(arguments.truth)
    reports = read_reports(arguments.reported, truth)
    print(json.dumps(score(truth, reports)))
    if arguments.wrong:
        lines = [report.line + "\n" for report in wrong(min(THRESHOLDS_MS), truth.blocks, reports)]
        arguments.wrong.write_text("".join(lines))


main()
