"""Says what a middleware costs a request: the same application with and without it takes turns in one process.

A turn lasts some milliseconds, so that what else the machine does meets all of them alike: its differences from second
to second are ten times what is to be measured. What a request costs in a turn is the process's CPU time by the number
of requests; the figures are differences from the bare application's turn of the same round, and their median. A JSON
line with all of them, and between which values the median is with 95 % confidence, comes once a second.
"""

import asyncio
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from truth import Application, Receive, Send

from loopguard_emit import LoopguardMiddleware

PATH = "/hello"
BARE = "bare"
TURN_S = 0.003
TELL_S = 1.0
# Of a normal distribution; in a turn with fewer requests one that is cut weighs too much.
CONFIDENCE = 1.96
LEAST_REQUESTS = 5


class Nothing:
    """The least that a middleware can be."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


def hello(*middleware: type) -> FastAPI:
    app = FastAPI()
    for one in middleware:
        app.add_middleware(one)

    @app.get(PATH)
    async def answer() -> PlainTextResponse:
        return PlainTextResponse("hello")

    return app


class Turns:
    """An application that is another one every few milliseconds."""

    def __init__(self, rest: Application, file: str) -> None:
        self._rest = rest
        self._file = Path(file)
        self._file.write_text("")
        self._apps: dict[str, Application] = {
            BARE: hello(),
            "a middleware that does nothing": hello(Nothing),
            "middleware": hello(LoopguardMiddleware),
        }
        self._names = list(self._apps)
        # Whose turn it is, and who is still to come in this round: in another order each time, for what ran before
        # leaves its traces.
        self._name = BARE
        self._left: list[str] = []
        self._chance = random.Random(1)
        self._until = self._tells = 0.0
        self._requests = 0
        self._since_ns = 0
        # Those that a middleware gives the loop are in use in its turns only.
        self._factories: dict[str, Any] = {}
        self._round: dict[str, float] = {}
        self._rounds: list[dict[str, float]] = []

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope.get("path") != PATH:
            await self._rest(scope, receive, send)
            return
        now = time.monotonic()
        if now >= self._until:
            self._next_turn(now)
        self._requests += 1
        await self._apps[self._name](scope, receive, send)

    def _next_turn(self, now: float) -> None:
        loop = asyncio.get_running_loop()
        if self._requests >= LEAST_REQUESTS:
            self._round[self._name] = (time.process_time_ns() - self._since_ns) / self._requests / 1e3
        self._factories[self._name] = loop.get_task_factory()
        if not self._left:
            if len(self._round) == len(self._names):
                self._rounds.append(self._round)
            self._round = {}
            if now >= self._tells:
                self._tell()
                self._tells = now + TELL_S
            self._left = self._chance.sample(self._names, len(self._names))
        self._name = self._left.pop()
        loop.set_task_factory(self._factories.get(self._name))
        self._requests = 0
        self._until = time.monotonic() + TURN_S
        self._since_ns = time.process_time_ns()

    def _tell(self) -> None:
        count = len(self._rounds)
        if count < 2:
            return
        bare = statistics.median(one[BARE] for one in self._rounds)
        told: dict[str, Any] = {"rounds": count, "bare_cpu_us": round(bare, 2)}
        for name in self._names[1:]:
            added = sorted(one[name] - one[BARE] for one in self._rounds)
            off = math.ceil(CONFIDENCE * math.sqrt(count) / 2)
            between = [added[max(0, count // 2 - off)], added[min(count - 1, count // 2 + off)]]
            median = statistics.median(added)
            told[name] = {
                "added_cpu_us": round(median, 2),
                "between_us": [round(value, 2) for value in between],
                "throughput_ratio": round(bare / (bare + median), 3),
                "between_ratio": [round(bare / (bare + value), 3) for value in reversed(between)],
            }
        with self._file.open("a") as file:
            file.write(json.dumps(told) + "\n")
