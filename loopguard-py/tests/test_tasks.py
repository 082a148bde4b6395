"""The tasks that a request starts are its own while it lasts."""

import asyncio
import gc
import sys
from typing import Any

import pytest
from conftest import Application, Server, Told, answer, http
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from loopguard_emit import LoopguardMiddleware, current_request
from loopguard_emit._native import TaskFactory


def serving(app: Application) -> Application:
    """The application, as a server runs it: each request in a task of its own."""
    wrapped = LoopguardMiddleware(app)

    async def call(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.create_task(as_coroutine(wrapped, scope, receive, send))

    return call


async def as_coroutine(app: Application, *arguments: Any) -> None:
    await app(*arguments)


async def owner() -> int | None:
    await asyncio.sleep(0)
    request = current_request()
    return request and request.id


def of_group_and_gather_and_task() -> list[Any]:
    async def gather() -> list[int | None]:
        return await asyncio.gather(owner(), owner())

    async def group() -> list[int | None]:
        async with asyncio.TaskGroup() as tasks:
            made = [tasks.create_task(owner()) for _ in range(2)]
        return [task.result() for task in made]

    async def grandchild() -> list[int | None]:
        return [await asyncio.create_task(gather_one())]

    async def gather_one() -> int | None:
        (found,) = await asyncio.gather(owner())
        return found

    async def wait_for() -> list[int | None]:
        return [await asyncio.wait_for(owner(), 60)]

    async def another_context() -> list[int | None]:
        from contextvars import Context

        return [await asyncio.create_task(owner(), context=Context())]

    return [gather, group, grandchild, wait_for, another_context]


@pytest.mark.parametrize("work", of_group_and_gather_and_task(), ids=lambda work: work.__name__)
def test_children_belong_to_their_request(told: Told, work: Any) -> None:
    owners = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = current_request()
        assert request is not None
        found = await work()
        owners.append(found == [request.id] * len(found))
        await answer(send)

    async def main() -> None:
        wrapped = serving(app)
        # The first request makes the loop known.
        await Server().serve(wrapped, http())
        await asyncio.gather(*(Server().serve(wrapped, http()) for _ in range(3)))

    asyncio.run(main())
    assert owners == [True] * 4
    steps = [line for line in told() if line.startswith(("enter", "exit"))]
    assert steps[::2] == [step.replace("exit", "enter") for step in steps[1::2]]


def test_base_http_middleware(told: Told, server: Server) -> None:
    owners = []

    async def endpoint(request: Request) -> Response:
        owners.append(await owner())

        async def body() -> Any:
            for _ in range(2):
                owners.append(await owner())
                yield b"x"

        return StreamingResponse(body())

    class Passing(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            owners.append(await owner())
            return await call_next(request)

    app = Starlette(
        routes=[Route("/a/{b}", endpoint)], middleware=[Middleware(LoopguardMiddleware), Middleware(Passing)]
    )
    scope = {**http("/a/1"), "query_string": b"", "root_path": "", "http_version": "1.1", "scheme": "http"}
    server.run(app, scope)
    assert len(owners) == 4
    assert owners[0] is not None
    assert len(set(owners)) == 1
    lines = told()
    assert "route 1 /a/{b}" in lines
    assert lines[-1] == "end 1 200"


def test_a_task_that_outlives_its_request_belongs_to_nobody_then(told: Told, server: Server) -> None:
    owners = []
    release = asyncio.Event()

    async def outlives() -> None:
        owners.append(await owner())
        await release.wait()
        owners.append(await owner())

    async def main() -> None:
        tasks = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            tasks.append(asyncio.create_task(outlives()))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await answer(send)

        await server.serve(LoopguardMiddleware(app), http())
        release.set()
        await tasks[0]

    asyncio.run(main())
    assert [owner is not None for owner in owners] == [True, False]
    lines = told()
    assert lines[-1] == "end 1 200"


def test_results_errors_and_names_of_children(server: Server) -> None:
    async def gives() -> tuple[int, int]:
        return (1, 2)

    async def fails() -> None:
        raise LookupError("child")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        task = asyncio.create_task(gives(), name="my name")
        coroutine = task.get_coro()
        assert asyncio.iscoroutine(coroutine)
        assert (task.get_name(), coroutine.__qualname__) == ("my name", gives.__qualname__)
        assert await task == (1, 2)
        with pytest.raises(LookupError, match="child"):
            await asyncio.create_task(fails())
        hung = asyncio.create_task(asyncio.sleep(60))
        await asyncio.sleep(0)
        hung.cancel("why")
        with pytest.raises(asyncio.CancelledError):
            await hung
        await answer(send)

    server.run(LoopguardMiddleware(app), http())
    assert server.sent


@pytest.mark.filterwarnings("error")
def test_a_child_that_is_cancelled_before_it_begins(server: Server) -> None:
    async def never() -> None:
        raise AssertionError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        task = asyncio.create_task(never())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        gc.collect()
        await answer(send)

    server.run(LoopguardMiddleware(app), http())
    assert server.sent


def test_the_loops_own_task_factory_is_asked(server: Server) -> None:
    made = []

    def factory(loop: Any, coroutine: Any, **options: Any) -> Any:
        made.append(coroutine.__name__)
        return asyncio.Task(coroutine, loop=loop, **options)

    async def child() -> None:
        pass

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.create_task(child())
        await answer(send)

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(factory)
        await server.serve(LoopguardMiddleware(app), http())
        await server.serve(LoopguardMiddleware(app), http())

    asyncio.run(main())
    # asyncio's own come last, when it shuts down.
    assert made[:2] == ["child", "child"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
def test_eager_children(told: Told, server: Server) -> None:
    owners: list[Any] = []

    async def child() -> None:
        owners.append(current_request())
        owners.append(await owner())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.create_task(child())
        await answer(send)

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
        await server.serve(LoopguardMiddleware(app), http())

    asyncio.run(main())
    assert owners[0] is not None
    assert owners[0].id == owners[1]
    steps = [line for line in told() if line.startswith(("enter", "exit"))]
    assert steps[::2] == ["enter 1"] * (len(steps) // 2)
    assert steps[1::2] == ["exit 1"] * (len(steps) // 2)


def test_tasks_may_be_left_alone(server: Server) -> None:
    factories = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        factories.append(asyncio.get_running_loop().get_task_factory())
        await answer(send)

    server.run(LoopguardMiddleware(app, follow_tasks=False), http())
    server.run(LoopguardMiddleware(app), http())
    assert factories[0] is None
    assert isinstance(factories[1], TaskFactory)


def test_every_loop_is_met() -> None:
    app = LoopguardMiddleware(Starlette(routes=[Route("/", lambda request: PlainTextResponse("x"))]))
    factories = []

    async def main() -> None:
        scope = {**http("/"), "query_string": b"", "root_path": ""}
        await Server().serve(app, scope)
        factories.append(asyncio.get_running_loop().get_task_factory())

    for _ in range(3):
        asyncio.run(main())
    assert all(isinstance(factory, TaskFactory) for factory in factories)
