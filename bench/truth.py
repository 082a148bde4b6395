"""Writes down what a server really did: for which request its event loop was blocked, and from when to when.

Times are CLOCK_MONOTONIC nanoseconds, which is the clock of loopguard's output too. One JSON object a line:

    {"type": "request", "request_id": .., "path": .., "start_ns": .., "end_ns": ..,
     "steps": [[start, end], ..], "spans": [[start, end, kind], ..]}
    {"type": "background", "spans": [[start, end, kind]]}

`steps` are the uninterrupted stretches of the request's own task of 3 ms or more, deliberate or not. `spans` are the
deliberate blocks, also those in child tasks and streamed bodies, where the request's own task does not run.
"""

import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[dict[str, Any], Receive, Send], Coroutine[Any, Any, None]]
Span = tuple[int, int, str]

SHORTEST_STEP_NS = 3_000_000

# Of the request this code runs for; child tasks inherit it with the context.
_spans: ContextVar[list[Span] | None] = ContextVar("spans", default=None)


def now() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


@contextmanager
def blocking(kind: str) -> Iterator[None]:
    """Everything inside runs on the loop's thread without returning to the loop."""
    start = now()
    try:
        yield
    finally:
        spans = _spans.get()
        if spans is not None:
            spans.append((start, now(), kind))


class Truth:
    """The file of ground truth. The server must close it: at SIGTERM uvicorn leaves without atexit."""

    def __init__(self, path: str) -> None:
        self._file: TextIO = open(path, "w", buffering=1 << 20)  # noqa: SIM115

    def write(self, record: Message) -> None:
        if not self._file.closed:
            self._file.write(json.dumps(record, separators=(",", ":")) + "\n")

    def background(self, start_ns: int, end_ns: int) -> None:
        self.write({"type": "background", "spans": [(start_ns, end_ns, "background")]})

    def close(self) -> None:
        self._file.close()


class _TimedSteps:
    """Drives a coroutine by hand and times each step, from one suspension to the next."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], steps: list[tuple[int, int]]) -> None:
        self._coroutine = coroutine
        self._steps = steps

    def __await__(self) -> Generator[Any, Any, None]:
        inner = self._coroutine.__await__()
        value: Any = None
        error: BaseException | None = None
        while True:
            start = now()
            try:
                awaited = inner.send(value) if error is None else inner.throw(error)
            except StopIteration:
                return
            finally:
                end = now()
                if end - start >= SHORTEST_STEP_NS:
                    self._steps.append((start, end))
            value = error = None
            try:
                value = yield awaited
            except BaseException as raised:  # a cancellation must reach the application
                error = raised


class Recording:
    """Middleware outside everything else: one record a request."""

    def __init__(self, application: Application, truth: Truth) -> None:
        self._application = application
        self._truth = truth

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        request_id = next((value.decode() for name, value in scope["headers"] if name == b"x-request-id"), None)
        spans: list[Span] = []
        steps: list[tuple[int, int]] = []
        token = _spans.set(spans)
        start = now()
        try:
            await _TimedSteps(self._application(scope, receive, send), steps)
        finally:
            _spans.reset(token)
            self._truth.write(
                {
                    "type": "request",
                    "request_id": request_id,
                    "path": scope["path"],
                    "start_ns": start,
                    "end_ns": now(),
                    "steps": steps,
                    "spans": spans,
                }
            )
