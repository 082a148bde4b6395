"""Servers without ASGI that block their loop on purpose: whoever blocks carries `block` in its path.

Run as `python frameworks.py aiohttp|sanic|tornado PORT`. It lives until its standard input is closed.
"""

import asyncio
import os
import sys
import threading
import time


def sleep(ms: int) -> None:
    time.sleep(ms / 1000)


def compute(ms: int) -> None:
    end = time.thread_time() + ms / 1000
    while time.thread_time() < end:
        pass


async def in_child(ms: int) -> None:
    async def child() -> None:
        await asyncio.sleep(0)
        sleep(ms)

    await asyncio.gather(child(), asyncio.sleep(0.001))


async def work(kind: str, ms: int) -> None:
    """What a request to `/KIND/MS` does."""
    match kind:
        case "block-sleep":
            sleep(ms)
        case "block-cpu":
            await asyncio.sleep(0.001)
            compute(ms)
        case "block-gather":
            await in_child(ms)
        case _:
            await asyncio.sleep(ms / 1000)


def serve_aiohttp(port: int) -> None:
    from aiohttp import web

    async def do(request: web.Request) -> web.Response:
        await work(request.match_info["kind"], int(request.match_info["ms"]))
        return web.Response(text="done")

    inner = web.Application()
    inner.add_routes([web.get("/{kind}/{ms}", do)])
    app = web.Application()
    app.add_subapp("/api", inner)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


def serve_sanic(port: int) -> None:
    from sanic import Request, Sanic
    from sanic.response import HTTPResponse, text

    app = Sanic("loopguard_test", configure_logging=False)

    @app.get("/api/<kind:str>/<ms:int>")
    async def do(_request: Request, kind: str, ms: int) -> HTTPResponse:
        await work(kind, ms)
        return text("done")

    app.run(host="127.0.0.1", port=port, single_process=True, motd=False, access_log=False)


def serve_tornado(port: int) -> None:
    from tornado.web import Application, RequestHandler

    class Do(RequestHandler):
        async def get(self, kind: str, ms: str) -> None:
            await work(kind, int(ms))
            self.write("done")

    async def serve() -> None:
        Application([(r"/api/([^/]+)/(\d+)", Do)]).listen(port, "127.0.0.1")
        await asyncio.Event().wait()

    asyncio.run(serve())


def end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    {"aiohttp": serve_aiohttp, "sanic": serve_sanic, "tornado": serve_tornado}[sys.argv[1]](int(sys.argv[2]))
