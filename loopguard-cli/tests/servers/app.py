"""A FastAPI application that blocks its loop on purpose: whoever blocks carries `block` in its path.

Run as `python app.py SERVER LOOP PORT`, with SERVER one of uvicorn-h11, uvicorn-httptools, hypercorn and LOOP one of
asyncio, uvloop. It prints `ready` once it serves, and lives until its standard input is closed.
"""

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

background_period_s = float(os.environ.get("BACKGROUND_PERIOD_S", "0"))


async def background_blocker() -> None:
    while True:
        await asyncio.sleep(background_period_s)
        time.sleep(0.15)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    tasks = []
    if background_period_s:
        tasks.append(asyncio.create_task(background_blocker(), name="background-blocker"))
    yield
    for task in tasks:
        task.cancel()


app = FastAPI(lifespan=lifespan)


async def through_middleware(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


if os.environ.get("BASE_HTTP_MIDDLEWARE"):
    app.add_middleware(BaseHTTPMiddleware, dispatch=through_middleware)


@app.get("/fine/{item}")
async def fine(item: str) -> str:
    await asyncio.sleep(0.01)
    return item


@app.get("/wait/{ms}")
async def wait(ms: int) -> str:
    await asyncio.sleep(ms / 1000)
    return "done"


@app.get("/block/cuts/{ms}")
async def block_cuts(ms: int) -> str:
    for _ in range(20):
        time.sleep(ms / 1000)  # line: block_cuts
        await asyncio.sleep(0)
    return "done"


@app.get("/block/sleep/{ms}")
async def block_sleep(ms: int) -> str:
    time.sleep(ms / 1000)  # line: block_sleep
    return "done"


@app.get("/block/cpu/{ms}")
async def block_cpu(ms: int) -> int:
    end = time.thread_time() + ms / 1000
    count = 0
    while time.thread_time() < end:
        count += 1
    return count


async def nested(levels: int, ms: int) -> None:
    if levels:
        await nested(levels - 1, ms)
    else:
        await asyncio.sleep(0)
        time.sleep(ms / 1000)


@app.get("/block/nested/{ms}")
async def block_nested(ms: int) -> str:
    await nested(8, ms)
    return "done"


@app.get("/block/lock/{ms}")
async def block_lock(ms: int) -> str:
    lock, held = threading.Lock(), threading.Event()

    def holder() -> None:
        with lock:
            held.set()
            time.sleep(ms / 1000)

    threading.Thread(target=holder).start()
    held.wait()
    with lock:
        return "done"


@app.get("/block/gather/{ms}")
async def block_gather(ms: int) -> str:
    async def child() -> None:
        await asyncio.sleep(0)
        time.sleep(ms / 1000)

    await asyncio.gather(child(), asyncio.sleep(0.001))
    return "done"


@app.get("/block/stream/{ms}")
async def block_stream(ms: int) -> StreamingResponse:
    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.sleep(0)
        time.sleep(ms / 1000)
        yield b"last"

    return StreamingResponse(body())


async def dependency(ms: int) -> None:
    await asyncio.sleep(0)
    time.sleep(ms / 1000)


@app.get("/block/dependency/{ms}")
async def block_dependency(_: None = Depends(dependency)) -> str:
    return "done"


async def or_like_litestar(scope: Scope, receive: Receive, send: Send) -> None:
    """The application, and one path whose route is told as Litestar tells it."""
    if not scope.get("path", "").startswith("/templated/"):
        await app(scope, receive, send)
        return
    scope["path_template"] = "/templated/{ms:int}"
    time.sleep(int(scope["path"].removeprefix("/templated/")) / 1000)
    await Response("done")(scope, receive, send)


def serve(server: str, loop: str, port: int) -> None:
    if server == "hypercorn":
        from hypercorn.asyncio import serve as hypercorn_serve
        from hypercorn.config import Config

        config = Config()
        config.bind = [f"127.0.0.1:{port}"]
        config.accesslog = config.errorlog = None

        async def main() -> None:
            await hypercorn_serve(or_like_litestar, config)  # type: ignore[arg-type]

        if loop == "uvloop":
            import uvloop

            uvloop.run(main())
        else:
            asyncio.run(main())
    else:
        import uvicorn

        http = server.removeprefix("uvicorn-")
        uvicorn.run(or_like_litestar, host="127.0.0.1", port=port, loop=loop, http=http, log_level="warning")


def end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
