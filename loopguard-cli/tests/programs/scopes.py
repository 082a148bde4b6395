"""Blocks an event loop on purpose, in the way named by the first argument, with an ASGI-like scope in its frames.

Says `ready` on stdout just before it blocks, and sleeps until it is killed. No packages: the standard library only.
"""

import asyncio
import sys
import threading
import time


class Route:
    def __init__(self, path):
        self.name = "item"
        self.path = path


def block():
    print("ready", flush=True)
    while True:
        time.sleep(1000)  # line: block


def make_scope(path="/items/7", port=51234):
    return {
        "type": "http",
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("10.1.2.3", port),
        "scheme": "http",
        "method": "POST",
        "path": path,
        "query_string": b"q=1",
        "headers": [
            (b"host", b"example.org"),
            (b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        ],
        "route": Route("/items/{id}"),
    }


async def bystander(scope):
    await asyncio.sleep(1000)


async def leaf():
    block()  # line: leaf


async def middle():
    await leaf()


class App:
    async def __call__(self, scope, receive, send):
        await self.endpoint(receive)  # line: app

    async def endpoint(self, mode):
        await MODES[mode](self)  # line: endpoint

    async def direct(self):
        await middle()  # line: direct

    async def greeting(self):
        """Generated code, and names outside ASCII."""
        namespace = {"block": block}
        exec("def generated():\n    pass\n    block()", namespace)

        def größe():
            return namespace["generated"]()  # line: größe

        def 長さ():
            return (
                größe(),  # line: 長さ
                0,
            )

        return 長さ()

    async def by_task(self):
        await asyncio.create_task(middle(), name="child-of-await")

    async def by_gather(self):
        await asyncio.gather(asyncio.sleep(1000), middle())

    async def by_group(self):
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(1000))
            group.create_task(middle())

    async def by_wait(self):
        await asyncio.wait([asyncio.create_task(middle())])

    async def by_wait_for(self):
        await asyncio.wait_for(asyncio.shield(asyncio.create_task(middle())), 1000)

    async def by_grandchild(self):
        async def between():
            await asyncio.gather(middle(), asyncio.sleep(1000))

        async with asyncio.TaskGroup() as group:
            group.create_task(between())


class CancelScope:
    __slots__ = ("deadline", "_host_task")  # noqa: RUF023

    def __init__(self):
        self._host_task = asyncio.current_task()


class TaskGroup:
    """anyio's, as far as it is seen from outside: the child knows only its group's scope."""

    __slots__ = ("cancel_scope",)

    def __init__(self):
        self.cancel_scope = CancelScope()

    async def run(self, scope):
        started = None

        def task_done(task):
            return self, started

        child = asyncio.create_task(middle())
        child.add_done_callback(task_done)
        await asyncio.get_running_loop().create_future()


async def shared():
    """Two requests await one task: it belongs to neither alone."""

    async def owner(scope):
        await task

    owners = asyncio.gather(owner(make_scope("/first", 1)), owner(make_scope("/second", 2)))
    task = asyncio.create_task(middle())  # Runs after its owners: both await it by the time it blocks.
    await owners


async def detached():
    """Started by a request, awaited by nobody."""

    async def request(scope):
        global background
        background = asyncio.create_task(middle(), name="background")
        await asyncio.sleep(1000)

    await request(make_scope())


class Cycle:
    """uvicorn keeps the scope in an attribute."""

    def __init__(self, scope):
        self.scope = scope

    async def run_asgi(self, app):
        await asyncio.create_task(middle())


async def closure():
    """The scope is in a cell, and a copy of it further in has the route."""

    async def app(request_scope, copied):
        async def inner(scope, receive):
            def uses():
                return scope

            await middle()  # line: inner

        await inner(copied, None)

    scope = make_scope()
    copied = dict(scope)
    del scope["route"]

    async def outer(self, scope):
        def uses():
            return scope

        await app(None, copied)

    await outer(None, scope)


async def serve(mode):
    _alive = [asyncio.create_task(bystander(make_scope(f"/other/{n}"))) for n in range(3)]
    await asyncio.sleep(0)
    if mode in GLOBAL_MODES:
        await GLOBAL_MODES[mode]()
    else:
        await App()(make_scope(), mode, None)


def other_loop():
    """A second loop in a second thread, whose own task must not be taken for the first thread's."""
    started = threading.Event()

    async def idle():
        started.set()
        await asyncio.sleep(1000)

    threading.Thread(target=lambda: asyncio.run(idle()), daemon=True, name="second").start()
    started.wait()


async def callback():
    """Blocks outside of any task."""
    asyncio.get_running_loop().call_soon(block)
    await asyncio.sleep(1000)


MODES = {
    "direct": App.direct,
    "greeting": App.greeting,
    "task": App.by_task,
    "gather": App.by_gather,
    "group": App.by_group,
    "wait": App.by_wait,
    "wait_for": App.by_wait_for,
    "grandchild": App.by_grandchild,
}
GLOBAL_MODES = {
    "shared": shared,
    "detached": detached,
    "closure": closure,
    "callback": callback,
    "anyio": lambda: TaskGroup().run(make_scope()),
    "run_asgi": lambda: Cycle(make_scope()).run_asgi(None),
}

if __name__ == "__main__":
    other_loop()
    asyncio.run(serve(sys.argv[1]))
