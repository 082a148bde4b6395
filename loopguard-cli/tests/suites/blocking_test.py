"""A FastAPI test-suite that passes, and blocks its event loop on the way."""

import time

from fastapi import FastAPI
from fastapi.testclient import TestClient

app = FastAPI()


@app.get("/report/{day}")
async def report(day: int) -> int:
    time.sleep(0.3)  # line: report
    return day


def test_report() -> None:
    with TestClient(app) as client:
        assert client.get("/report/3").json() == 3


def test_report_without_the_lifespan() -> None:
    # Its loop lives for this one request.
    assert TestClient(app).get("/report/4").json() == 4
