"""Blocks an event loop on purpose, in a handler of the server named by the first argument, which has no ASGI scope.

The servers' request objects, as far as they are seen from outside. Says `ready` on stdout just before it blocks, and
sleeps until it is killed. No packages: the standard library only.
"""

import asyncio
import sys
import threading
import time
from collections import namedtuple

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Fields:
    """An object with the attributes it is given."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


class BaseRequest(Fields):
    __module__ = "aiohttp.web_request"


class Request(Fields):
    __module__ = "sanic.request.types"


class HTTPServerRequest(Fields):
    __module__ = "tornado.httputil"


def aiohttp():
    message = namedtuple("RawRequestMessage", "method path version headers raw_headers")
    raw_headers = ((b"Host", b"example.org"), (b"Traceparent", TRACE.encode()))
    resource = Fields(_formatter="/items/{id}")
    return BaseRequest(
        _message=message("POST", "/items/7?q=1", (1, 1), None, raw_headers),
        _transport_peername=("10.1.2.3", 51234),
        _match_info=Fields(_route=Fields(_resource=resource)),
    )


def sanic():
    return Request(
        head=f"POST /items/7?q=1 HTTP/1.1\r\nHost: example.org\r\nTraceparent: {TRACE}".encode(),
        route=Fields(path="items/{id}"),
        conn_info=Fields(client_ip="10.1.2.3", client_port=51234),
    )


def tornado():
    headers = Fields(_as_list={"Host": ["example.org"], "Traceparent": [TRACE]})
    return HTTPServerRequest(method="POST", uri="/items/7?q=1", remote_ip="10.1.2.3", headers=headers)


class RequestHandler:
    """Tornado's, which keeps its request."""

    def __init__(self, request):
        self.request = request

    async def _execute(self):
        block()  # line: execute


async def handle(request):
    block()  # line: handle


def block():
    print("ready", flush=True)
    while True:
        time.sleep(1000)  # line: block


async def serve(mode):
    if mode == "tornado":
        await RequestHandler(tornado())._execute()  # line: serve tornado
    else:
        await handle({"aiohttp": aiohttp, "sanic": sanic}[mode]())  # line: serve


def other_loop():
    """A second loop in a second thread, whose own task must not be taken for the first thread's."""
    started = threading.Event()

    async def idle():
        started.set()
        await asyncio.sleep(1000)

    threading.Thread(target=lambda: asyncio.run(idle()), daemon=True, name="second").start()
    started.wait()


if __name__ == "__main__":
    other_loop()
    asyncio.run(serve(sys.argv[1]))
