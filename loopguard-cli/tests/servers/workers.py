"""An ASGI application for servers with several worker processes, which writes down how each worker blocked.

TRUTH names a file that all workers append to, one JSON object a line, before and after each block. Times are
CLOCK_MONOTONIC nanoseconds:

    {"pid": .., "id": .., "begin": ..}
    {"pid": .., "id": .., "end": ..}

A worker that is killed in a block leaves no end. `id` is the request's x-request-id; null while the worker starts.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from fastapi import FastAPI, Request

STARTUP_BLOCK_S = 0.15

truth = os.open(os.environ["TRUTH"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def write(request_id: str | None, edge: str) -> None:
    line: dict[str, Any] = {"pid": os.getpid(), "id": request_id, edge: time.clock_gettime_ns(time.CLOCK_MONOTONIC)}
    os.write(truth, json.dumps(line).encode() + b"\n")


@contextmanager
def blocking(request_id: str | None) -> Iterator[None]:
    write(request_id, "begin")
    yield
    write(request_id, "end")


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    with blocking(None):
        time.sleep(STARTUP_BLOCK_S)
    yield


app = FastAPI(lifespan=lifespan)


@app.get("/fine/{item}")
async def fine(item: str) -> int:
    await asyncio.sleep(0.005)
    return os.getpid()


@app.get("/block/sleep/{ms}")
async def block_sleep(ms: int, request: Request) -> int:
    with blocking(request.headers["x-request-id"]):
        time.sleep(ms / 1000)
    return os.getpid()


@app.get("/block/cpu/{ms}")
async def block_cpu(ms: int, request: Request) -> int:
    with blocking(request.headers["x-request-id"]):
        end = time.perf_counter() + ms / 1000
        while time.perf_counter() < end:
            pass
    return os.getpid()
