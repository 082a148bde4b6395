"""What the probes tell of requests of every kind."""

import asyncio
import gc
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Server, Told, answer, http

from loopguard_emit import LoopguardMiddleware, Request, current_request


def test_a_request_of_one_step(server: Server, told: Told) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["route"] = SimpleNamespace(path="/items/{id}")
        await answer(send, 201)

    server.run(LoopguardMiddleware(app), http("/items/7", (b"x-request-id", b"abc")))
    assert told() == ["start 1 GET /items/7 abc", "enter 1", "route 1 /items/{id}", "exit 1", "end 1 201"]


@pytest.mark.parametrize(
    ("template", "line"), [("/items/{id:int}", ["route 1 /items/{id:int}"]), (None, []), (b"/items", [])]
)
def test_a_route_as_litestar_keeps_it(server: Server, told: Told, template: object, line: list[str]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["path_template"] = template
        await answer(send)

    server.run(LoopguardMiddleware(app), http())
    assert told() == ["start 1 GET /x", "enter 1", *line, "exit 1", "end 1 200"]


def test_every_step_between_two_awaits(server: Server, told: Told) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        scope["route"] = SimpleNamespace(path="/x")
        await asyncio.sleep(0)
        await answer(send)

    server.run(LoopguardMiddleware(app), http())
    assert told() == [
        "start 1 GET /x",
        *("enter 1", "exit 1"),
        *("enter 1", "route 1 /x", "exit 1"),
        *("enter 1", "exit 1"),
        "end 1 200",
    ]


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ([(b"x-request-id", b"a"), (b"x-request-id", b"b"), (b"traceparent", b"t")], "a"),
        ([(b"traceparent", b"00-1234-56-01")], "00-1234-56-01"),
        ([[b"x-request-id", b"in-a-list"]], "in-a-list"),
        ([(b"x-request-id", b"\xff\n")], r"\xff\n"),
        ([], ""),
        ([(b"x-request-id",), 7, None], ""),
        (None, ""),
    ],
)
def test_names_of_requests(server: Server, told: Told, headers: Any, name: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send)

    server.run(LoopguardMiddleware(app), {**http(), "headers": headers})
    assert told()[0] == f"start 1 GET /x {name}".rstrip()


def test_scopes_that_break_the_rules(server: Server, told: Told) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pass

    app = LoopguardMiddleware(app)
    for scope in [{"type": "http"}, {"type": "http", "path": "/\udcff", "method": 3}, {"type": 5}, {}]:
        server.run(app, scope)
    lines = told()
    assert [line for line in lines if line.startswith("start")] == [
        "start 1",
        r"start 2  /\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd",
    ]
    assert [line for line in lines if line.startswith("end")] == ["end 1 0", "end 2 0"]


def test_a_request_that_raises(server: Server, told: Told) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        server.run(LoopguardMiddleware(app), http())
    assert told()[-3:] == ["enter 1", "exit 1", "end 1 500"]


def test_a_request_that_raises_after_it_began_to_answer(server: Server, told: Told) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 206, "headers": []})
        raise LookupError

    with pytest.raises(LookupError):
        server.run(LoopguardMiddleware(app), http())
    assert told()[-1] == "end 1 206"


def test_a_request_that_is_cancelled(server: Server, told: Told) -> None:
    reached = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            reached.append("cancelled")
            await asyncio.sleep(0)
            raise
        finally:
            reached.append("cleaned up")

    async def main() -> None:
        task = asyncio.create_task(server.serve(LoopguardMiddleware(app), http()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert reached == ["cancelled", "cleaned up"]
    assert told() == ["start 1 GET /x", *("enter 1", "exit 1") * 3, "end 1 0"]


def test_a_request_that_nobody_waits_for_any_longer(server: Server, told: Told) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    request = LoopguardMiddleware(app)(http(), server.receive, server.send)
    request.__await__().close()
    del request
    gc.collect()
    assert told() == ["start 1 GET /x", "enter 1", "exit 1", "end 1 0"]


def test_a_websocket(server: Server, told: Told) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": "echo"})
        await send({"type": "websocket.close"})

    server.incoming = [{"type": "websocket.connect"}, {"type": "websocket.receive"}, {"type": "websocket.disconnect"}]
    server.run(LoopguardMiddleware(app), {"type": "websocket", "path": "/ws", "headers": []})
    assert told() == ["start 1 WEBSOCKET /ws", *("enter 1", "exit 1") * 4, "end 1 101"]
    assert [message["type"] for message in server.sent] == ["websocket.accept", "websocket.send", "websocket.close"]


@pytest.mark.parametrize(
    ("message", "status"),
    [({"type": "websocket.close"}, 403), ({"type": "websocket.http.response.start", "status": 401}, 401)],
)
def test_a_websocket_that_is_refused(server: Server, told: Told, message: Any, status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(message)

    server.run(LoopguardMiddleware(app), {"type": "websocket", "path": "/ws", "headers": []})
    assert told()[-1] == f"end 1 {status}"


def test_a_stream_of_events(server: Server, told: Told) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(5):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body"})

    server.run(LoopguardMiddleware(app), http("/events"))
    assert told() == ["start 1 GET /events", *("enter 1", "exit 1") * 6, "end 1 200"]
    assert len(server.sent) == 7


def test_a_lifespan_is_no_request_however_long_it_is(told: Told) -> None:
    requests, lifespan = Server(), Server()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await answer(send)
            return
        assert (await receive())["type"] == "lifespan.startup"
        await send({"type": "lifespan.startup.complete"})
        background = asyncio.create_task(asyncio.sleep(60))
        assert current_request() is None
        while (await receive())["type"] != "lifespan.shutdown":
            pass
        background.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def main() -> None:
        wrapped = LoopguardMiddleware(app)
        # Minutes make no difference: what counts is how often it runs.
        lifespan.incoming = [{"type": "lifespan.startup"}, *[{"type": "tick"}] * 600, {"type": "lifespan.shutdown"}]
        life = asyncio.create_task(lifespan.serve(wrapped, {"type": "lifespan"}))
        await asyncio.sleep(0)
        await requests.serve(wrapped, http())
        await life

    asyncio.run(main())
    assert told() == ["start 1 GET /x", "enter 1", "exit 1", "end 1 200"]
    assert [message["type"] for message in lifespan.sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_excluded_paths_pass_unseen(server: Server, told: Told) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send)

    app = LoopguardMiddleware(app, exclude_paths=["/health"])
    server.run(app, http("/health"))
    server.run(app, http("/health/not"))
    assert told()[0] == "start 1 GET /health/not"
    assert len(server.sent) == 4


def test_a_middleware_inside_another_adds_nothing(server: Server, told: Told) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send)

    inner = LoopguardMiddleware(app)

    async def mount(scope: Any, receive: Any, send: Any) -> None:
        await inner({**scope, "path": "/mounted"}, receive, send)

    server.run(LoopguardMiddleware(mount), http())
    assert told() == ["start 1 GET /x", "enter 1", "exit 1", "end 1 200"]


def test_a_request_made_inside_another(server: Server, told: Told) -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        await answer(send)

    wrapped = LoopguardMiddleware(inner)

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        await Server().serve(wrapped, http("/inner"))
        await answer(send, 202)

    server.run(LoopguardMiddleware(outer), http("/outer"))
    lines = told()
    # Never two at a time.
    steps = [line for line in lines if line.startswith(("enter", "exit"))]
    assert all(
        enter.split()[0] == "enter" and exit_ == enter.replace("enter", "exit")
        for enter, exit_ in zip(steps[::2], steps[1::2], strict=True)
    )
    assert [line for line in lines if line.startswith("end")] == ["end 2 200", "end 1 202"]


def test_requests_in_turns(told: Told) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        await answer(send)

    async def main() -> None:
        wrapped = LoopguardMiddleware(app)
        await asyncio.gather(*(Server().serve(wrapped, http(f"/{number}")) for number in (1, 2)))

    asyncio.run(main())
    steps = [line for line in told() if line.startswith(("enter", "exit"))]
    assert steps == ["enter 1", "exit 1", "enter 2", "exit 2"] * 4


def test_nobody_listens(server: Server) -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(send)
        await answer(send)

    server.run(LoopguardMiddleware(app), http())
    # The server's own: nothing was put around it.
    assert seen == [server.send]


def test_the_request_of_the_running_code(server: Server) -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = current_request()
        assert request is not None
        seen.append((request, request.name, request.scope is scope, request.over))
        seen.append(await asyncio.to_thread(current_request))
        await answer(send)

    scope = http("/x", (b"x-request-id", b"abc"))
    server.run(LoopguardMiddleware(app), scope)
    (request, *rest), in_a_thread = seen
    assert rest == [b"abc", True, False]
    assert in_a_thread is None
    assert request.over
    assert current_request() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="probes are Linux's")
def test_a_tracer_is_noticed(tmp_path: Any) -> None:
    """A tracer patches the no-op; this puts something there and takes it away before it could run."""
    import re
    import subprocess

    from loopguard_emit import _native

    notes = subprocess.run(["readelf", "-nW", _native.__file__], capture_output=True, text=True, check=True).stdout
    sites = [int(site, 16) for site in re.findall(r"Location: (0x[0-9a-f]+)", notes)]
    assert len(sites) == 5
    with open("/proc/self/maps") as maps:
        base = min(int(line.split("-")[0], 16) for line in maps if _native.__file__ in line)
    assert not _native.is_traced()
    for site in sites:
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(base + site)
            no_op = memory.read(1)
            assert no_op == b"\x0f"
            memory.seek(base + site)
            memory.write(b"\xcc")
            patched = _native.is_traced()
            memory.seek(base + site)
            memory.write(no_op)
        assert patched
    assert not _native.is_traced()


def test_a_request_that_is_over_is_no_garbage(server: Server) -> None:
    """A finished request is gone without the garbage collector."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        await answer(send)

    app = LoopguardMiddleware(app)
    gc.collect()
    before = requests_alive()
    gc.disable()
    try:
        for _ in range(50):
            server.sent.clear()
            server.run(app, http())
        assert requests_alive() == before
    finally:
        gc.enable()


def requests_alive() -> int:
    return sum(isinstance(found, Request) for found in gc.get_objects())


def test_time_is_told_by_the_clock_of_records(server: Server) -> None:
    seen: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = current_request()
        assert request is not None
        seen.extend([request.running_since_ns, time.monotonic_ns()])
        await answer(send)

    before = time.monotonic_ns()
    server.run(LoopguardMiddleware(app), http())
    assert before <= seen[0] <= seen[1]
