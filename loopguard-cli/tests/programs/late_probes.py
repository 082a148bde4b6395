"""An event loop that loads the probes when a line comes in, tells of a request at the next, and ends with the input."""

import asyncio
import sys
from typing import Any


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await asyncio.sleep(0.01)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"late"})


async def receive() -> dict[str, Any]:
    return {"type": "http.request"}


async def send(message: dict[str, Any]) -> None:
    pass


async def main() -> None:
    loop = asyncio.get_running_loop()
    print("runs", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    from loopguard_emit import LoopguardMiddleware

    await loop.run_in_executor(None, sys.stdin.readline)
    headers = [(b"x-request-id", b"late")]
    scope = {"type": "http", "method": "GET", "path": "/late", "headers": headers, "query_string": b""}
    await LoopguardMiddleware(app)(scope, receive, send)
    print("done", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)


asyncio.run(main())
