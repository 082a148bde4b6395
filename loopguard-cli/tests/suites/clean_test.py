"""A FastAPI test-suite in which nothing blocks."""

import asyncio

from fastapi import FastAPI
from fastapi.testclient import TestClient

app = FastAPI()


@app.get("/items/{item}")
async def read_item(item: int) -> int:
    await asyncio.sleep(0.01)
    return item


def test_items() -> None:
    with TestClient(app) as client:
        for item in range(5):
            assert client.get(f"/items/{item}").json() == item


def test_an_item_without_the_lifespan() -> None:
    assert TestClient(app).get("/items/7").json() == 7
