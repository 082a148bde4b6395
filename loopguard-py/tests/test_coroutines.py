"""An application behaves inside the middleware as it does outside."""

import asyncio
import inspect
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from conftest import Server, answer, http

from loopguard_emit import LoopguardMiddleware


class Awaitable:
    """Yields what it is given and returns what it is sent."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __await__(self) -> Any:
        sent = None
        for value in self.values:
            sent = yield value
        return sent


async def yields(log: list[Any]) -> Any:
    log.append(await Awaitable("a", "b"))
    return (1, 2)


async def catches(log: list[Any]) -> Any:
    try:
        await Awaitable("a")
    except ValueError as error:
        log.append(str(error))
        await Awaitable("caught")
    return ValueError("returned, not raised")


async def cleans_up(log: list[Any]) -> Any:
    try:
        await Awaitable("a", "b")
    finally:
        log.append("cleaned up")


async def ignores_its_end(log: list[Any]) -> Any:
    try:
        await Awaitable("a")
    except GeneratorExit:
        await Awaitable("no")


async def raises_stop(log: list[Any]) -> Any:
    raise StopIteration("inside")


async def returns_none(log: list[Any]) -> Any:
    return None


def drives() -> dict[str, list[tuple[str, Any]]]:
    return {
        "send": [("send", None), ("send", None), ("send", 7)],
        "send too early": [("send", 7)],
        "throw": [("send", None), ("throw", ValueError("thrown")), ("send", None)],
        "throw at once": [("throw", KeyError("early")), ("send", None)],
        "throw a class": [("send", None), ("throw", ValueError)],
        "close": [("send", None), ("close", None), ("send", None)],
        "close at once": [("close", None), ("send", None)],
        "on and on": [("send", None)] * 5,
    }


def drive(coroutine: Any, calls: list[tuple[str, Any]]) -> list[Any]:
    outcomes: list[Any] = []
    for method, argument in calls:
        try:
            arguments = () if method == "close" else (argument,)
            outcomes.append(("gave", getattr(coroutine, method)(*arguments)))
        except BaseException as error:
            value = error.value if isinstance(error, StopIteration) else str(error)
            outcomes.append((type(error).__name__, repr(value)))
    return outcomes


@pytest.mark.parametrize("calls", drives().values(), ids=drives())
@pytest.mark.parametrize("make", [yields, catches, cleans_up, ignores_its_end, raises_stop, returns_none])
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_driven_by_hand(make: Callable[[list[Any]], Coroutine[Any, Any, Any]], calls: list[tuple[str, Any]]) -> None:
    bare: list[Any] = []
    wrapped: list[Any] = []

    async def directly() -> Any:
        return await make(bare)

    async def app(scope: Any, receive: Any, send: Any) -> Any:
        return await make(wrapped)

    async def awaits() -> Any:
        return await LoopguardMiddleware(app)(http(), None, None)  # type: ignore[arg-type]

    expected = drive(directly(), calls)
    assert drive(LoopguardMiddleware(app)(http(), None, None), calls) == expected  # type: ignore[arg-type]
    assert wrapped == bare
    wrapped.clear()
    if calls[0][0] == "send":
        # Through a coroutine around it, which servers have.
        assert drive(awaits(), calls) == expected
        assert wrapped == bare


def test_servers_see_an_asynchronous_application() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pass

    wrapped = LoopguardMiddleware(app)
    # uvicorn, hypercorn and asgiref look at `__call__`.
    assert inspect.iscoroutinefunction(wrapped.__call__)
    assert wrapped.app is app
    # Some make a task of it at once.
    asyncio.run(make_a_task(wrapped))


async def make_a_task(app: Any) -> None:
    server = Server()
    await asyncio.create_task(app(http(), server.receive, server.send))
    await asyncio.create_task(app.__call__(http(), server.receive, server.send))


def test_an_application_that_returns_another_awaitable(server: Server) -> None:
    class Application:
        def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
            return self.run(send)

        def run(self, send: Any) -> Any:
            class Later:
                def __await__(self) -> Any:
                    return answer(send).__await__()

            return Later()

    server.run(LoopguardMiddleware(Application()), http())
    assert [message["type"] for message in server.sent] == ["http.response.start", "http.response.body"]


def test_an_application_that_is_none(server: Server) -> None:
    with pytest.raises(TypeError):
        server.run(LoopguardMiddleware(lambda scope, receive, send: 3), http())  # type: ignore[arg-type, return-value]


def test_context_variables_and_tasks_are_the_servers(server: Server) -> None:
    from contextvars import ContextVar

    variable: ContextVar[str] = ContextVar("variable", default="unset")
    tasks = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks.append(asyncio.current_task())
        variable.set("by the application")
        await answer(send)

    async def main() -> None:
        await server.serve(LoopguardMiddleware(app), http())
        assert variable.get() == "by the application"
        assert tasks == [asyncio.current_task()]

    asyncio.run(main())


def test_a_traceback_leads_to_the_line(server: Server) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        raise LookupError

    with pytest.raises(LookupError) as caught:
        server.run(LoopguardMiddleware(app), http())
    assert caught.traceback[-1].name == "app"


@pytest.mark.skipif(sys.version_info < (3, 14), reason="asyncio shows call graphs since 3.14")
def test_asyncio_sees_through_it(server: Server) -> None:
    graphs = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.create_task(server.serve(LoopguardMiddleware(app), http()))
        await asyncio.sleep(0)
        graphs.append(asyncio.format_call_graph(task))
        task.cancel()

    asyncio.run(main())
    assert "app" in graphs[0]


def test_wrong_options() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pass

    options: list[dict[str, Any]] = [
        {"threshold_ms": 0},
        {"threshold_ms": float("nan")},
        {"threshold_ms": float("inf")},
        {"enforcement": "shout"},
        {"exclude_paths": "/health"},
    ]
    for wrong in options:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoopguardMiddleware(app, **wrong)


@pytest.mark.parametrize("by_name", [(), ("send",), ("receive", "send"), ("scope", "receive", "send")])
def test_it_is_called_by_name_too(by_name: tuple[str, ...]) -> None:
    calls: list[tuple[Any, ...]] = []

    async def app(*arguments: Any) -> None:
        calls.append(arguments)

    given: dict[str, Any] = {"scope": http(), "receive": object(), "send": object()}
    in_place = [value for name, value in given.items() if name not in by_name]

    async def call() -> None:
        await LoopguardMiddleware(app)(*in_place, **{name: given[name] for name in by_name})

    asyncio.run(call())
    assert calls == [tuple(given.values())]


@pytest.mark.parametrize(
    ("in_place", "by_name"), [(2, {}), (4, {}), (3, {"send": 1}), (2, {"receive": 1}), (2, {"send": 1, "more": 2})]
)
def test_it_is_called_with_three_things(in_place: int, by_name: dict[str, int]) -> None:
    async def app(*arguments: Any) -> None:
        pytest.fail("nobody may call it")

    with pytest.raises(TypeError):
        LoopguardMiddleware(app)(*[http(), 1, 2, 3][:in_place], **by_name)  # type: ignore[arg-type]
