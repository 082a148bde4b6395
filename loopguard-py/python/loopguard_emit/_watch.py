"""Finds what blocks the event loops of this process for a while, and on which lines: for tests."""

import asyncio
import linecache
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Final, TypeAlias, TypeVar, cast

from loopguard_emit._native import Request
from loopguard_emit._tasks import follow_tasks

T = TypeVar("T")

# Code and line in code of one's own, and the innermost ones.
_Line: TypeAlias = tuple[CodeType, int, CodeType, int]

_LIBRARIES: Final = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(__file__).parent), "<frozen"}
)
# A block is looked at several times before it is long enough to be one.
_LOOKS: Final = 5


@dataclass(frozen=True)
class Block:
    """A time in which a loop ran nothing but one callback, or one step of a task."""

    duration_ns: int
    line: str | None

    def __str__(self) -> str:
        return f"{self.duration_ns / 1e6:.1f} ms {self.line or 'on a line that is not known'}"


class Watch:
    """Times what event loops run, and looks from a thread of its own at what takes long."""

    def __init__(self, threshold_ns: int) -> None:
        self.threshold_ns = threshold_ns
        self.blocks: list[Block] = []
        # By thread: since when it runs what it runs.
        self._running: dict[int, int] = {}
        self._watched: dict[int, Request] = {}
        # By thread and since when.
        self._lines: dict[tuple[int, int], Counter[_Line]] = {}
        self._over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Everything that loops of asyncio's own kind run meanwhile, in whatever thread."""
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            with self._timed():
                run(handle)

        onlooker = threading.Thread(target=self._look, name="loopguard-watch", daemon=True)
        onlooker.start()
        asyncio.Handle._run = timed  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            asyncio.Handle._run = run  # type: ignore[method-assign]
            self._over.set()
            onlooker.join()

    async def run(self, awaitable: Awaitable[T]) -> T:
        """Also what another kind of loop runs, as far as it is this and the tasks it starts."""
        __tracebackhide__ = True
        loop = asyncio._get_running_loop()
        if isinstance(loop, asyncio.BaseEventLoop):
            return await awaitable
        if loop is not None:
            follow_tasks(loop)
        thread = threading.get_ident()
        watched = Request.watch(awaitable, self.threshold_ns, lambda _, since, until: self._ended(thread, since, until))
        self._watched[thread] = watched
        try:
            return cast(T, await watched)
        finally:
            del self._watched[thread]

    @contextmanager
    def _timed(self) -> Iterator[None]:
        thread, since = threading.get_ident(), time.monotonic_ns()
        self._running[thread] = since
        try:
            yield
        finally:
            self._running.pop(thread, None)
            self._ended(thread, since, time.monotonic_ns())

    def _ended(self, thread: int, since: int, until: int) -> None:
        lines = self._lines.pop((thread, since), None)
        if until - since >= self.threshold_ns:
            self.blocks.append(Block(until - since, _told(lines.most_common(1)[0][0]) if lines else None))

    def _look(self) -> None:
        while not self._over.wait(self.threshold_ns / 1e9 / _LOOKS):
            now = time.monotonic_ns()
            for thread in [*self._running, *self._watched]:
                since = self._since(thread)
                if not since or now - since < self.threshold_ns / 2:
                    continue
                frame = sys._current_frames().get(thread)
                if frame is None:
                    continue
                line = _line(frame)
                # Still the same one: the line is of it.
                if self._since(thread) == since:
                    self._lines.setdefault((thread, since), Counter())[line] += 1

    def _since(self, thread: int) -> int:
        """When the loop of a thread began what it runs; 0: it runs nothing."""
        watched = self._watched.get(thread)
        return self._running.get(thread, 0) or (watched.running_since_ns if watched else 0)


def _line(innermost: FrameType) -> _Line:
    """Where that is, in code of one's own if there is any.

    Does nothing that releases the GIL: the thread would go on, and its frames with it.
    """
    frame: FrameType | None = innermost
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    own = frame or innermost
    return own.f_code, own.f_lineno, innermost.f_code, innermost.f_lineno


def _told(line: _Line) -> str:
    own, number, innermost, innermost_number = line
    where = f"at {_place(own, number)}"
    source = linecache.getline(own.co_filename, number).strip()
    if source:
        where += f": {source}"
    return where if own is innermost else f"{where} (in {_place(innermost, innermost_number)})"


def _place(code: CodeType, number: int) -> str:
    path = Path(code.co_filename)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f"{path}:{number} {code.co_qualname}"
