"""What a response and a log say of the request that blocked, and that they say it of no other."""

import asyncio
import json
import logging
import sys
import time
from typing import Any

import pytest
from conftest import Message, Server, answer, http

from loopguard_emit import Enforcement, LoopguardMiddleware

THRESHOLD_MS = 20


def block() -> None:
    # More than twice the threshold: no machine is so fast that it is not a block.
    time.sleep(3 * THRESHOLD_MS / 1000)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Blocks as often as its path says."""
    for _ in range(scope["path"].count("block")):
        await asyncio.sleep(0)
        block()
    await answer(send)


def served(path: str, enforcement: Enforcement | None, *headers: tuple[bytes, bytes]) -> list[Message]:
    wrapped = LoopguardMiddleware(app, threshold_ms=THRESHOLD_MS, enforcement=enforcement)
    return Server().run(wrapped, http(path, *headers))


def said(sent: list[Message]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def test_a_log_line_for_each_block(caplog: pytest.LogCaptureFixture) -> None:
    served("/block/block", "log", (b"x-request-id", b"abc"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert {record.name for record in caplog.records} == {"loopguard_emit"}
    line = caplog.messages[0]
    assert line.startswith("GET /block/block (route unknown, id abc) blocked the event loop for ")
    assert float(line.split()[-2]) >= THRESHOLD_MS


def test_what_clients_send_forges_no_lines(caplog: pytest.LogCaptureFixture) -> None:
    served("/block\nWARNING \x1b[31m forged" + "x" * 1000, "log", (b"x-request-id", b"a\nb"))
    (line,) = caplog.messages
    assert "\n" not in line
    assert "\x1b" not in line
    assert len(line) < 1000


def test_nothing_is_said_without_enforcement(caplog: pytest.LogCaptureFixture) -> None:
    sent = served("/block", None)
    assert not caplog.messages
    assert sent[0]["headers"] == []


def test_headers_of_who_blocked() -> None:
    headers = said(served("/block/block", "warn", (b"x-request-id", b"abc")))
    assert headers.keys() == {"x-request-id", "x-blocking-count", "x-blocking-total-ms", "x-blocking-detected"}
    assert (headers["x-request-id"], headers["x-blocking-detected"]) == ("abc", "true")
    assert headers["x-blocking-count"] == "2"
    assert float(headers["x-blocking-total-ms"]) >= 2 * THRESHOLD_MS


def test_the_step_that_answers_counts_as_well() -> None:
    async def blocks_and_answers(scope: Any, receive: Any, send: Any) -> None:
        block()
        await answer(send)

    wrapped = LoopguardMiddleware(blocks_and_answers, threshold_ms=THRESHOLD_MS, enforcement="warn")
    assert said(Server().run(wrapped, http()))["x-blocking-count"] == "1"


def test_headers_of_who_did_not() -> None:
    headers = said(fine())
    assert (headers["x-blocking-count"], headers["x-blocking-total-ms"]) == ("0", "0.0")
    assert headers["x-blocking-detected"] == "false"


def fine() -> list[Message]:
    # So long a step would be a fault of the machine.
    wrapped = LoopguardMiddleware(app, threshold_ms=60_000, headers=True)
    return Server().run(wrapped, http("/fine"))


@pytest.mark.parametrize("given", [b"", b"a b", b"a\r\nset-cookie: b", b"x" * 129, b"\xff"])
def test_names_that_must_not_be_sent_back(given: bytes) -> None:
    names = {said(served("/fine", "warn", (b"x-request-id", given)))["x-request-id"] for _ in range(2)}
    assert len(names) == 2
    assert all(name.isascii() and name.isprintable() and " " not in name for name in names)


def test_headers_that_the_application_sent_stay() -> None:
    async def names_itself(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": ((b"X-Request-ID", b"own"),)})
        await send({"type": "http.response.body"})

    sent = Server().run(LoopguardMiddleware(names_itself, headers=True), http())
    assert [value for name, value in sent[0]["headers"] if name.lower() == b"x-request-id"] == [b"own"]


def test_strict_refuses_who_blocked() -> None:
    sent = served("/block", "strict", (b"x-request-id", b"abc"))
    start, body = sent
    assert start["status"] == 503
    headers = said(sent)
    assert headers["x-blocking-detected"] == "true"
    assert int(headers["content-length"]) == len(body["body"])
    reason = json.loads(body["body"])
    assert (reason["request_id"], reason["blocking_count"]) == ("abc", 1)


def test_strict_lets_others_be() -> None:
    """They are in flight, held up by the one that blocks, and answered after it."""
    wrapped = LoopguardMiddleware(bystander_app, threshold_ms=10 * THRESHOLD_MS, enforcement="strict")

    async def main() -> list[int]:
        servers = [Server() for _ in range(5)]
        paths = ["/fine", "/fine", "/block", "/fine", "/fine"]
        await asyncio.gather(*(server.serve(wrapped, http(path)) for server, path in zip(servers, paths, strict=True)))
        return [server.sent[0]["status"] for server in servers]

    assert asyncio.run(main()) == [200, 200, 503, 200, 200]


async def bystander_app(scope: Any, receive: Any, send: Any) -> None:
    for _ in range(3):
        await asyncio.sleep(0)
        if scope["path"] == "/block":
            time.sleep(15 * THRESHOLD_MS / 1000)
    await answer(send)


def test_strict_is_too_late_once_the_response_has_begun(caplog: pytest.LogCaptureFixture) -> None:
    async def streams(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        block()
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await asyncio.sleep(0)
        await send({"type": "http.response.body"})

    wrapped = LoopguardMiddleware(streams, threshold_ms=THRESHOLD_MS, enforcement="strict")
    sent = Server().run(wrapped, http())
    assert [message.get("status") for message in sent] == [200, None, None]
    assert len(caplog.messages) == 1


def test_strict_without_headers_changes_no_good_answer() -> None:
    wrapped = LoopguardMiddleware(app, threshold_ms=60_000, enforcement="strict", headers=False)
    assert Server().run(wrapped, http("/fine"))[0] == {"type": "http.response.start", "status": 200, "headers": []}


def test_children_block_for_their_request() -> None:
    async def child() -> None:
        await asyncio.sleep(0)
        block()

    async def gathers(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.gather(child(), asyncio.sleep(0))
        await answer(send)

    wrapped = LoopguardMiddleware(gathers, threshold_ms=THRESHOLD_MS, enforcement="strict")
    assert Server().run(wrapped, http())[0]["status"] == 503


def test_who_tells_of_a_block_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("loopguard_emit")

    class Failing(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise LookupError

    failing = Failing()
    logger.addFilter(failing)
    try:
        seen: list[Any] = []
        monkeypatch.setattr(sys, "unraisablehook", seen.append)
        sent = served("/block", "log")
    finally:
        logger.removeFilter(failing)
    assert sent[0]["status"] == 200
    assert [type(failure.exc_value) for failure in seen] == [LookupError]
