"""Keeps the tasks that a request starts with their request."""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from loopguard_emit._native import ChildSteps, TaskFactory

T = TypeVar("T")


def follow_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Has the loop make its tasks with our factory, which asks the one it had."""
    previous = loop.get_task_factory()
    if not isinstance(previous, TaskFactory):
        loop.set_task_factory(TaskFactory(previous, asyncio.Task, _follow))


def _follow(
    scope: dict[str, Any] | None, steps: ChildSteps[T], child: Coroutine[Any, Any, T]
) -> Coroutine[Any, Any, T]:
    """To whoever asks for its name, as tasks and warnings do, it is the child."""
    followed = _of_request(scope, steps)
    followed.__name__ = child.__name__  # type: ignore[attr-defined]
    followed.__qualname__ = child.__qualname__  # type: ignore[attr-defined]
    return followed


async def _of_request(scope: dict[str, Any] | None, steps: ChildSteps[T]) -> T:
    """A coroutine of Python's own type around the steps. A tracer finds the request by the name `scope`."""
    return await steps


async def awaited(awaitable: Awaitable[T]) -> T:
    """A coroutine that is as long as something else that can be awaited."""
    return await awaitable
