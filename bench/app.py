"""A FastAPI app that blocks its event loop in the ways real servers do, or doesn't, and writes down what it did.

Environment: BENCH_TRUTH is the file of ground truth (unset: a plain app, for measuring overhead); BENCH_SLOW_PORT the
port of `slow_server.py`; BENCH_FOLDER where files are written and synced; BENCH_IN_PROCESS=1 adds fastapi-loopguard's
middleware, with BENCH_REPORTS as the file of what it reports (see `in_process.py`); BENCH_MIDDLEWARE=1 adds that of
`loopguard-emit`; BENCH_DEBUG is the file of what asyncio's debug mode reports (see `debug_mode.py`); BENCH_TURNS
that of what middleware costs (see `turns.py`).
"""

import asyncio
import hashlib
import os
import random
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from truth import Application, Recording, Truth, blocking, now

TRUTH = Truth(os.environ["BENCH_TRUTH"]) if "BENCH_TRUTH" in os.environ else None
SLOW_PORT = int(os.environ.get("BENCH_SLOW_PORT", "0"))
FOLDER = os.environ.get("BENCH_FOLDER", ".")
BACKGROUND_BLOCK_S = 0.07
BACKGROUND_PERIOD_S = 1.5


async def block_in_background(truth: Truth) -> None:
    """Belongs to no request: whoever is blamed for it is innocent."""
    chance = random.Random(7)
    while True:
        await asyncio.sleep(BACKGROUND_PERIOD_S * (0.5 + chance.random()))
        start = now()
        time.sleep(BACKGROUND_BLOCK_S)
        truth.background(start, now())


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    if "BENCH_DEBUG" in os.environ:
        import debug_mode

        debug_mode.install(os.environ["BENCH_DEBUG"])
    background = asyncio.create_task(block_in_background(TRUTH), name="background-blocker") if TRUTH else None
    yield
    if background:
        background.cancel()
    if TRUTH:
        TRUTH.close()


api = FastAPI(lifespan=lifespan)


@api.get("/hello")
async def hello() -> PlainTextResponse:
    return PlainTextResponse("hello")


# Nothing below /ok blocks the loop, however long it takes.
@api.get("/ok/sleep/{ms}")
async def ok_sleep(ms: float) -> None:
    await asyncio.sleep(ms / 1000)


@api.get("/ok/pool/{ms}")
def ok_pool(ms: float) -> None:
    time.sleep(ms / 1000)


def pooled_dependency(ms: float) -> None:
    time.sleep(ms / 1000)


@api.get("/ok/dependency/{ms}")
async def ok_dependency(_: Annotated[None, Depends(pooled_dependency)]) -> None:
    pass


@api.get("/ok/thread/{ms}")
async def ok_thread(ms: float) -> None:
    await asyncio.to_thread(time.sleep, ms / 1000)


@api.get("/ok/stream/{ms}")
async def ok_stream(ms: float) -> StreamingResponse:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(6):
            yield b"x" * 256
            await asyncio.sleep(ms / 6000)

    return StreamingResponse(body())


@api.get("/block/sleep/{ms}")
async def block_sleep(ms: float) -> None:
    with blocking("sleep"):
        time.sleep(ms / 1000)


@api.get("/block/between/{ms}")
async def block_between_awaits(ms: float) -> None:
    """Is still in flight long after it blocked."""
    await asyncio.sleep(0.005)
    with blocking("between"):
        time.sleep(ms / 1000)
    await asyncio.sleep(0.05)


@api.get("/block/cpu/{ms}")
async def block_cpu(ms: float) -> None:
    with blocking("cpu"):
        end = time.perf_counter() + ms / 1000
        while time.perf_counter() < end:
            pass


@api.post("/block/hash/{ms}")
async def block_hash(request: Request, ms: float) -> None:
    """C code that lets go of the GIL, but not of the loop."""
    body = await request.body()
    with blocking("hash"):
        end = time.perf_counter() + ms / 1000
        while time.perf_counter() < end:
            hashlib.pbkdf2_hmac("sha256", body, b"salt", 20000)


@api.get("/block/file/{ms}")
async def block_file(ms: float) -> None:
    with blocking("file"):
        end = time.perf_counter() + ms / 1000
        while True:
            file = os.open(os.path.join(FOLDER, "synced.bin"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            os.write(file, b"z" * 262_144)
            os.fsync(file)
            os.close(file)
            if time.perf_counter() >= end:
                break


@api.get("/block/socket/{ms}")
async def block_socket(ms: float) -> None:
    with blocking("socket"), socket.create_connection(("127.0.0.1", SLOW_PORT), timeout=5) as slow:
        slow.sendall(f"{ms}\n".encode())
        slow.recv(16)


@api.get("/block/lock/{ms}")
async def block_lock(ms: float) -> None:
    lock, held = threading.Lock(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            time.sleep(ms / 1000)

    with blocking("lock"):
        threading.Thread(target=hold, daemon=True).start()
        held.wait(1)
        with lock:
            pass


@api.get("/block/gil/{ms}")
async def block_gil(ms: float) -> None:
    """Another thread holds the GIL in long calls of C code."""
    done = threading.Event()

    def hog() -> None:
        end = time.perf_counter() + ms / 1000
        while time.perf_counter() < end:
            sum(range(300_000))
        done.set()

    with blocking("gil"):
        threading.Thread(target=hog, daemon=True).start()
        while not done.is_set():
            pass


@api.get("/block/cuts/{ms}")
async def block_cuts(ms: float) -> None:
    """Twenty short blocks with an await after each."""
    for _ in range(20):
        with blocking("cut"):
            time.sleep(ms / 1000)
        await asyncio.sleep(0)


async def nested(level: int, ms: float) -> None:
    if level:
        await nested(level - 1, ms)
        return
    await asyncio.sleep(0.002)
    with blocking("nested"):
        time.sleep(ms / 1000)


@api.get("/block/nested/{ms}")
async def block_nested(ms: float) -> None:
    await nested(10, ms)


@api.get("/block/gather/{ms}")
async def block_gather(ms: float) -> None:
    """A child task blocks, not the request's own."""

    async def child() -> None:
        await asyncio.sleep(0.003)
        with blocking("child"):
            time.sleep(ms / 1000)

    await asyncio.gather(child(), asyncio.sleep(0.02))


async def blocking_dependency(ms: float) -> None:
    await asyncio.sleep(0.001)
    with blocking("dependency"):
        time.sleep(ms / 1000)


@api.get("/block/dependency/{ms}")
async def block_dependency(_: Annotated[None, Depends(blocking_dependency)]) -> None:
    pass


@api.get("/block/stream/{ms}")
async def block_stream(ms: float) -> StreamingResponse:
    async def body() -> AsyncIterator[bytes]:
        for part in range(5):
            if part == 3:
                with blocking("stream"):
                    time.sleep(ms / 1000)
            yield b"x" * 256
            await asyncio.sleep(0.005)

    return StreamingResponse(body())


@api.get("/waits/{count}")
async def short_waits(count: int, depth: int = 50) -> int:
    """So many waits of 100 us under so many frames of its own: for what looking at one of them costs. Says how many
    frames there are then in all."""

    def wait(level: int) -> int:
        if level:
            return wait(level - 1)
        for _ in range(count):
            time.sleep(0.0001)
        frame, frames = sys._getframe(), 0
        while frame:
            frame, frames = frame.f_back, frames + 1
        return frames

    return wait(depth)


if os.environ.get("BENCH_IN_PROCESS") == "1":
    import in_process

    in_process.install(api, os.environ.get("BENCH_REPORTS"))

if os.environ.get("BENCH_MIDDLEWARE") == "1":
    from loopguard_emit import LoopguardMiddleware

    api.add_middleware(LoopguardMiddleware)

app: Application | FastAPI = Recording(api, TRUTH) if TRUTH else api
if "BENCH_TURNS" in os.environ:
    import turns

    app = turns.Turns(api, os.environ["BENCH_TURNS"])
