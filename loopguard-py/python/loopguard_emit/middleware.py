"""The ASGI middleware: brackets every step of the application, and says in logs and responses which request blocked."""

import json
import logging
import math
import secrets
from collections.abc import Iterable
from functools import partial
from typing import Final, Literal, Self, TypeAlias, get_args

from loopguard_emit import _tasks
from loopguard_emit._asgi import Application, Message, Receive, Scope, Send
from loopguard_emit._native import Gate, Request

Enforcement: TypeAlias = Literal["log", "warn", "strict"]

_LOGGER: Final = logging.getLogger("loopguard_emit")
_MAX_LOGGED: Final = 200


class LoopguardMiddleware(Gate):
    """Tells tracers where requests begin and end and which of them runs, and finds those that block their event loop.

    A block is a step, what runs between two awaits, that takes `threshold_ms` or longer by the clock on the wall.
    Whose step it is is known, so nobody else is blamed for it.

    `enforcement`: `"log"` writes a line for each block to the logger `loopguard_emit`; `"warn"` also says it in the
    response's headers; `"strict"` also answers 503 in the place of a request that blocked before its response began.
    None does nothing of this and leaves it to the tracer.

    `headers`: whether HTTP responses have the headers `x-request-id`, `x-blocking-count`, `x-blocking-total-ms` and
    `x-blocking-detected`. By default they do with `"warn"` and `"strict"`.

    `exclude_paths`: requests for exactly these paths pass unseen.

    `follow_tasks`: whether the tasks that a request starts are its own while it lasts. For this the event loop gets a
    task factory, which asks the one it had.
    """

    def __new__(
        cls,
        app: Application,
        *,
        threshold_ms: float = 50.0,
        enforcement: Enforcement | None = "log",
        headers: bool | None = None,
        exclude_paths: Iterable[str] = (),
        follow_tasks: bool = True,
    ) -> Self:
        if not 0 < threshold_ms < math.inf:
            raise ValueError(f"threshold_ms must be a positive number, not {threshold_ms!r}")
        if enforcement is not None and enforcement not in get_args(Enforcement):
            raise ValueError(f"enforcement must be one of {get_args(Enforcement)} or None, not {enforcement!r}")
        if isinstance(exclude_paths, str):
            raise ValueError("exclude_paths must be several paths, not a string")
        if headers is None:
            headers = enforcement in ("warn", "strict")
        strict = enforcement == "strict"
        self = super().__new__(
            cls,
            app,
            threshold_ns=int(threshold_ms * 1e6),
            on_block=_log if enforcement else None,
            excluded=frozenset(exclude_paths),
            answer=partial(_answer, strict=strict, headers=headers) if strict or headers else None,
            prefix=secrets.token_hex(8),
            on_loop=_tasks.follow_tasks if follow_tasks else None,
        )

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            await self(scope, receive, send)

        # Calling the middleware is native code, which nobody can tell to be asynchronous. Servers look here.
        self.__dict__["__call__"] = call
        return self


class _Answer:
    """A response that says what its request is called and whether it blocked, or that is refused because it did."""

    __slots__ = ("_headers", "_refused", "_request", "_strict")

    def __init__(self, request: Request, *, strict: bool, headers: bool) -> None:
        self._request = request
        self._strict = strict
        self._headers = headers
        self._refused = False

    async def send(self, message: Message) -> None:
        if self._refused:
            # The rest of a response that another has taken the place of.
            return
        if message["type"] != "http.response.start":
            await self._request.respond(message)
            return
        count, total_ms = self._request.blocking()
        if self._strict and count:
            self._refused = True
            await self._refuse(count, total_ms)
            return
        if self._headers:
            headers = list(message.get("headers", ()))
            taken = {bytes(name).lower() for name, _ in headers}
            headers += [(name, value) for name, value in self._says(count, total_ms) if name not in taken]
            message = {**message, "headers": headers}
        await self._request.respond(message)

    async def _refuse(self, count: int, total_ms: float) -> None:
        reason = {
            "detail": "this request blocked the event loop",
            "request_id": (self._request.name or b"").decode("latin-1"),
            "blocking_count": count,
            "blocking_total_ms": round(total_ms, 1),
        }
        body = json.dumps(reason).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *self._says(count, total_ms),
        ]
        await self._request.respond({"type": "http.response.start", "status": 503, "headers": headers})
        await self._request.respond({"type": "http.response.body", "body": body})

    def _says(self, count: int, total_ms: float) -> list[tuple[bytes, bytes]]:
        return [
            (b"x-request-id", self._request.name or b""),
            (b"x-blocking-count", b"%d" % count),
            (b"x-blocking-total-ms", b"%.1f" % total_ms),
            (b"x-blocking-detected", b"true" if count else b"false"),
        ]


def _answer(request: Request, *, strict: bool, headers: bool) -> Send:
    return _Answer(request, strict=strict, headers=headers).send


def _log(request: Request, since_ns: int, until_ns: int) -> None:
    scope = request.scope or {}
    _LOGGER.warning(
        "%s %s (route %s, id %s) blocked the event loop for %.1f ms",
        _printable(scope.get("method", "WEBSOCKET")),
        _printable(scope.get("path", "")),
        _printable(request.route or "unknown"),
        _printable((request.name or b"none").decode("latin-1")),
        (until_ns - since_ns) / 1e6,
    )


def _printable(text: object) -> str:
    """What a client sent must not forge lines of a log, nor fill it."""
    return str(text)[:_MAX_LOGGED].encode("unicode_escape").decode("ascii")
