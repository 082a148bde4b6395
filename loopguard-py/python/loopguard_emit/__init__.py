"""Tells tracers which request an ASGI server is working on, and what of it blocked the event loop.

`LoopguardMiddleware` goes around an application. The pytest plugin comes with the package.
"""

from collections.abc import Coroutine

from loopguard_emit._native import ChildSteps, Request, current_request
from loopguard_emit.middleware import Enforcement, LoopguardMiddleware

# They can be awaited, sent to, thrown into and closed, as asyncio asks of what it makes tasks of.
Coroutine.register(Request)
Coroutine.register(ChildSteps)

__all__ = ["Enforcement", "LoopguardMiddleware", "Request", "current_request"]
