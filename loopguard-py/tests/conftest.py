"""A server that sends nothing anywhere, and what the probes told meanwhile."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from loopguard_emit import _native

pytest_plugins = ["pytester"]

Message = dict[str, Any]
Application = Callable[..., Awaitable[None]]


class Server:
    """Runs applications for scopes, and remembers what they sent."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.incoming: list[Message] = []

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def receive(self) -> Message:
        await asyncio.sleep(0)
        if not self.incoming:
            # The client is there, and has nothing more to say.
            await asyncio.Future()
        return self.incoming.pop(0)

    async def serve(self, app: Application, scope: dict[str, Any]) -> None:
        await app(scope, self.receive, self.send)

    def run(self, app: Application, scope: dict[str, Any]) -> list[Message]:
        asyncio.run(self.serve(app, scope))
        return self.sent


def http(path: str = "/x", *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "method": "GET", "path": path, "headers": list(headers)}


async def answer(send: Callable[[Message], Awaitable[None]], status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


class Told:
    """What the probes told, with the requests' ids numbered in the order of their first mention."""

    def __call__(self) -> list[str]:
        numbers: dict[str, int] = {}
        told = []
        for line in _native.recorded():
            probe, request, *rest = line.split(" ")
            number = numbers.setdefault(request, len(numbers) + 1)
            told.append(" ".join([probe, str(number), *rest]).rstrip())
        return told


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def told() -> Iterator[Told]:
    _native.recorded()
    _native.record(True)
    yield Told()
    _native.record(False)
    _native.recorded()
