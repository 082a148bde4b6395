"""Turns on asyncio's debug mode and writes down what it reports, one JSON object a line.

It reports callbacks (a step of a task is one) that took `slow_callback_duration` or longer, with the task's name; which
request that was it does not know.
"""

import asyncio
import json
import logging
import time

THRESHOLD_S = 0.01


class _WriteDown(logging.Handler):
    def __init__(self, reports: str) -> None:
        super().__init__()
        # By line: uvicorn leaves at SIGTERM without closing files.
        self._file = open(reports, "w", buffering=1)  # noqa: SIM115

    def emit(self, record: logging.LogRecord) -> None:
        end = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        if not record.msg.startswith("Executing") or not isinstance(record.args, tuple):
            return
        seconds = record.args[1]
        if not isinstance(seconds, float):
            return
        report = {
            "type": "block",
            "event": "single",
            "t_start_ns": end - int(seconds * 1e9),
            "t_end_ns": end,
            "duration_ms": seconds * 1000,
            "requests": [],
        }
        self._file.write(json.dumps(report) + "\n")


def install(reports: str) -> None:
    """In the loop that runs."""
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = THRESHOLD_S
    logger = logging.getLogger("asyncio")
    logger.addHandler(_WriteDown(reports))
    # What it says is in the file.
    logger.propagate = False
