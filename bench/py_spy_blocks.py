"""Reads blocks out of what `py-spy record --format chrometrace` wrote.

usage: py_spy_blocks.py TRACE.json START_NS APP.py

Prints a report, one JSON object a line, for every stretch of samples in which a function of the application was the
outermost one of the application on the loop's thread. Whether that was one step or several in a row samples can't tell,
nor which request it was. START_NS is CLOCK_MONOTONIC when py-spy began to sample; its times count from there.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

# A frame that only the thread with the server's loop has.
LOOP_FILE = "uvicorn/server.py"
SHORTEST_US = 1000


def stretches(events: list[dict[str, Any]], app: str) -> list[tuple[float, float]]:
    """Of one thread, in microseconds."""
    found: list[tuple[float, float, str]] = []
    stack: list[dict[str, Any]] = []
    # How deep the application's outermost function is.
    depth = 0
    for event in events:
        if event["ph"] == "B":
            stack.append(event)
            if not depth and event["args"]["filename"].endswith(app):
                depth = len(stack)
        elif stack:
            began = stack.pop()
            if depth != len(stack) + 1:
                continue
            depth = 0
            start, name = began["ts"], began["name"]
            # On another line of the same function a sample begins everything anew.
            if found and found[-1][1:] == (start, name):
                start = found.pop()[0]
            found.append((start, event["ts"], name))
    return [(start, end) for start, end, _ in found]


def main() -> None:
    path, start_ns, app = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in json.loads(path.read_text()):
        if event["ph"] in "BE":
            threads[event["tid"]].append(event)
    for events in threads.values():
        if not any(event["args"]["filename"].endswith(LOOP_FILE) for event in events if event["ph"] == "B"):
            continue
        for begin, end in stretches(events, app):
            if end - begin < SHORTEST_US:
                continue
            report = {
                "type": "block",
                "event": "single",
                "t_start_ns": start_ns + int(begin * 1000),
                "t_end_ns": start_ns + int(end * 1000),
                "duration_ms": (end - begin) / 1000,
                "requests": [],
            }
            print(json.dumps(report))


main()
