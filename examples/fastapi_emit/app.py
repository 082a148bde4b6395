"""A FastAPI application that tells of its requests itself, by the middleware of loopguard-emit, and sometimes blocks.

    uvicorn --app-dir examples/fastapi_emit app:app
    curl -i http://127.0.0.1:8000/reports/7      # 503: it blocked its loop
    sudo loopguard attach --name uvicorn --format jsonl

The tests of loopguard run it as well.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator

from fastapi import FastAPI, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse

from loopguard_emit import LoopguardMiddleware

app = FastAPI()
app.add_middleware(LoopguardMiddleware, enforcement=os.environ.get("ENFORCEMENT", "strict"), exclude_paths=["/health"])


@app.get("/health")
async def health() -> PlainTextResponse:
    return PlainTextResponse("well")


@app.get("/items/{item}")
async def item(item: str) -> str:
    await asyncio.sleep(0.01)
    return item


@app.get("/reports/{day}")
async def report(day: int, ms: int = 300) -> int:
    """Blocks the loop: only this request is refused for it."""
    await asyncio.sleep(0)
    time.sleep(ms / 1000)  # line: report
    return day


@app.get("/totals/{day}")
async def totals(day: int, ms: int = 300) -> list[int]:
    """Its child blocks."""

    async def add_up() -> int:
        await asyncio.sleep(0.01)
        time.sleep(ms / 1000)  # line: add_up
        return day

    return await asyncio.gather(add_up(), asyncio.sleep(0.02, 0))


@app.get("/broken")
async def broken() -> None:
    await asyncio.sleep(0)
    raise LookupError("no such thing")


@app.get("/patience")
async def patience() -> None:
    """Is cancelled while it waits."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_later(0.05, task.cancel)
    await asyncio.sleep(3600)


@app.get("/events")
async def events() -> StreamingResponse:
    async def body() -> AsyncIterator[str]:
        for number in range(5):
            yield f"data: {number}\n\n"
            await asyncio.sleep(0.01)

    return StreamingResponse(body(), media_type="text/event-stream")


@app.websocket("/chat/{room}")
async def chat(websocket: WebSocket, room: str) -> None:
    await websocket.accept()
    for _ in range(3):
        await websocket.send_text(room)
        await asyncio.sleep(0.01)
    await websocket.close()
