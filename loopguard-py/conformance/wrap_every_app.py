"""A pytest plugin for test suites that know nothing of it: writes down how each test went, and, where it is asked to,
puts the middleware around every application.

Where a test client calls an application it is wrapped as a server would see it; where a test calls it by hand, inside
its outermost layer. The probes are on, as if a tracer listened.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
import starlette.testclient
from fastapi import FastAPI
from starlette.applications import Starlette

from loopguard_emit import LoopguardMiddleware, _native

WRAP = os.environ["CONFORMANCE_WRAP"] == "1"
OUTCOMES = Path(os.environ["CONFORMANCE_OUTCOMES"])

_outcomes: list[str] = []
_wrapped_requests = 0


def _wrap_application_of(transport: Any) -> None:
    original = transport.__init__

    @functools.wraps(original)
    def init(self: Any, app: Any, *args: Any, **kwargs: Any) -> None:
        original(self, LoopguardMiddleware(app), *args, **kwargs)

    transport.__init__ = init


def _wrap_stack_of(application: Any) -> None:
    original: Callable[[Any], Any] = application.build_middleware_stack

    @functools.wraps(original)
    def build(self: Any) -> Any:
        return LoopguardMiddleware(original(self))

    application.build_middleware_stack = build


def pytest_configure() -> None:
    if not WRAP:
        return
    for transport in (starlette.testclient._TestClientTransport, httpx.ASGITransport, httpx2.ASGITransport):
        _wrap_application_of(transport)
    for application in (Starlette, FastAPI):
        if "build_middleware_stack" in vars(application):
            _wrap_stack_of(application)
    _native.record(True)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    global _wrapped_requests
    _wrapped_requests += sum(line.startswith("start ") for line in _native.recorded())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes.append(f"{report.nodeid} {report.when} {report.outcome}".encode("unicode_escape").decode())


def pytest_sessionfinish() -> None:
    OUTCOMES.write_text("".join(f"{outcome}\n" for outcome in sorted(_outcomes)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"{_wrapped_requests} requests ran inside the middleware")
