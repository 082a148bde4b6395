from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import CodeType, FrameType
from typing import Any, Generic, Self, TypeVar, final

from loopguard_emit._asgi import Application, Message, Receive, Scope, Send

T = TypeVar("T")

class Gate:
    """The middleware without its Python part."""

    def __new__(
        cls,
        app: Application,
        *,
        threshold_ns: int,
        on_block: Callable[[Request, int, int], object] | None,
        excluded: frozenset[str],
        answer: Callable[[Request], Send] | None,
        prefix: str,
        on_loop: Callable[[Any], object] | None,
    ) -> Self: ...
    @property
    def app(self) -> Application: ...
    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]: ...

@final
class Request:
    """A request whose steps are marked: an awaitable that runs the application. Times are `time.monotonic_ns`'s."""

    @staticmethod
    def watch(
        awaitable: Awaitable[Any], threshold_ns: int, on_block: Callable[[Request, int, int], object], /
    ) -> Request: ...
    @property
    def id(self) -> int:
        """As the probes tell it; unique in this process."""
    @property
    def name(self) -> bytes | None:
        """The `x-request-id` header, or the one that the response will have; else the `traceparent` header."""
    @property
    def scope(self) -> dict[str, Any] | None: ...
    @property
    def route(self) -> str | None:
        """The template, once the application has found it."""
    @property
    def over(self) -> bool: ...
    @property
    def running_since_ns(self) -> int:
        """Since when its code has been running; 0: it does not run."""
    def blocking(self) -> tuple[int, float]:
        """How many of its steps blocked the loop, that which runs now among them, and the milliseconds they took."""
    def respond(self, message: Message, /) -> Awaitable[None]:
        """Sends a message to the server, after a look at what it says of the response."""
    def __await__(self) -> Generator[Any, Any, Any]: ...
    def __iter__(self) -> Generator[Any, Any, Any]: ...
    def __next__(self) -> Any: ...
    def send(self, value: Any, /) -> Any: ...
    def throw(self, *exception: Any) -> Any: ...
    def close(self) -> None: ...
    @property
    def cr_await(self) -> Any | None: ...
    @property
    def cr_code(self) -> CodeType | None: ...
    @property
    def cr_frame(self) -> FrameType | None: ...
    @property
    def cr_running(self) -> bool | None: ...

@final
class ChildSteps(Generic[T]):
    """Runs a child task's coroutine, with every step of it marked as its request's."""

    def __await__(self) -> Generator[Any, Any, T]: ...

@final
class TaskFactory:
    """Leaves the tasks that a request starts with their request."""

    def __new__(
        cls,
        previous: Callable[..., Any] | None,
        task: Callable[..., Any],
        follow: Callable[[dict[str, Any] | None, ChildSteps[T], Coroutine[Any, Any, T]], Coroutine[Any, Any, T]],
        /,
    ) -> TaskFactory: ...
    def __call__(self, event_loop: Any, coroutine: Any, **options: Any) -> Any: ...

def current_request() -> Request | None:
    """The request that the calling code belongs to. None: none, or the calling thread is not the event loop's."""

def is_traced() -> bool: ...
def record(on: bool, /) -> None: ...
def recorded() -> list[str]: ...
