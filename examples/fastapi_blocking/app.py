"""A small shop whose handlers block the event loop in the ways real ones do, next to handlers that do not.

    uvicorn app:app --app-dir examples/fastapi_blocking

Every blocking line is marked `blocks:`; loopguard should name exactly these. The payment service is expected at
PAYMENTS_URL; load.py plays it.
"""

import asyncio
import hashlib
import json
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.encoders import jsonable_encoder
from pydantic import BaseModel

PAYMENTS_URL = os.environ.get("PAYMENTS_URL", "http://127.0.0.1:8001")
HOUSEKEEPING_EVERY_S = 2.0
UPLOAD_PIECE = 16 * 1024

catalogue: dict[int, dict[str, Any]] = {
    number: {"id": number, "name": f"Item {number}", "tags": [f"tag-{n}" for n in range(20)], "price": number * 1.1}
    for number in range(1, 2001)
}
sessions: dict[str, float] = {}


class Credentials(BaseModel):
    user: str
    password: str


class Order(BaseModel):
    item: int
    quantity: int = 1


def drop_old_sessions(now: float) -> None:
    for user in [user for user, since in sessions.items() if now - since > 60]:
        del sessions[user]
    time.sleep(0.04)  # blocks: stands for a slow synchronous store


async def housekeeping() -> None:
    """A background task: it blocks the loop too, and no request is to blame."""
    while True:
        await asyncio.sleep(HOUSEKEEPING_EVERY_S)
        drop_old_sessions(time.monotonic())


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    task = asyncio.create_task(housekeeping(), name="housekeeping")
    yield
    task.cancel()


app = FastAPI(title="Shop", lifespan=lifespan)


# What blocks.


@app.get("/reports/{day}")
async def report(day: str) -> dict[str, str]:
    time.sleep(0.08)  # blocks: a synchronous sleep in an async handler
    return {"day": day, "status": "ready"}


def charge(order: Order) -> dict[str, Any]:
    """What a handler written against a synchronous HTTP client does."""
    body = json.dumps({"item": order.item, "quantity": order.quantity}).encode()
    request = urllib.request.Request(f"{PAYMENTS_URL}/charge", data=body, method="POST")
    with urllib.request.urlopen(request, timeout=5) as response:  # blocks: waits for another server
        receipt: dict[str, Any] = json.load(response)
    return receipt


@app.post("/orders")
async def place_order(order: Order) -> dict[str, Any]:
    if order.item not in catalogue:
        raise HTTPException(404, "no such item")
    try:
        return {"order": order.item, "receipt": charge(order)}
    except urllib.error.URLError as error:
        raise HTTPException(502, "the payment service does not answer") from error


def verify_password(password: str) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", password.encode(), b"salt", 150_000)  # blocks: hashing, on the CPU


@app.post("/login")
async def login(credentials: Credentials) -> dict[str, str]:
    token = verify_password(credentials.password).hex()
    sessions[credentials.user] = time.monotonic()
    return {"token": token[:16]}


@app.get("/catalogue/export")
async def export_catalogue() -> Response:
    items = jsonable_encoder(list(catalogue.values()))  # blocks: serializing, on the CPU
    return Response(json.dumps(items), media_type="application/json")


def write_durably(data: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        for start in range(0, len(data), UPLOAD_PIECE):
            file.write(data[start : start + UPLOAD_PIECE])
            file.flush()
            os.fsync(file.fileno())  # blocks: waits for the disk


@app.post("/uploads")
async def upload(request: Request) -> dict[str, int]:
    data = await request.body()
    write_durably(data)
    return {"size": len(data)}


def current_user(user: str = "guest") -> str:
    """A synchronous dependency: FastAPI runs it in a thread, so it does not block."""
    time.sleep(0.02)
    return user


# What is fine.


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@app.get("/items/{item}")
async def item(item: int) -> dict[str, Any]:
    await asyncio.sleep(0.01)  # an asynchronous database
    if item not in catalogue:
        raise HTTPException(404, "no such item")
    return catalogue[item]


@app.get("/recommendations")
async def recommendations() -> dict[str, list[int]]:
    async def score(number: int) -> int:
        await asyncio.sleep(0.15)  # long, but it awaits
        return number * 7 % 100

    return {"items": list(await asyncio.gather(*(score(number) for number in range(5))))}


@app.get("/me")
async def me(user: str = Depends(current_user)) -> dict[str, str]:
    return {"user": user}


@app.get("/statement")
def statement() -> dict[str, str]:
    time.sleep(0.12)  # fine: FastAPI runs synchronous handlers in a thread
    return {"status": "ready"}


@app.get("/reports-fixed/{day}")
async def report_fixed(day: str) -> dict[str, str]:
    """What /reports/{day} should do."""
    await asyncio.to_thread(time.sleep, 0.08)
    return {"day": day, "status": "ready"}
