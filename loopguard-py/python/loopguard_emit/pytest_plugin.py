"""The pytest plugin: fails a test that blocks its event loop, and says on which line."""

import functools
import inspect
import math
from collections.abc import Generator
from typing import Any

import pytest

from loopguard_emit._watch import Watch

_DEFAULT_THRESHOLD_MS = "50"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "loopguard_threshold_ms",
        "how long a test may block its event loop, in milliseconds",
        default=_DEFAULT_THRESHOLD_MS,
    )
    parser.addini(
        "loopguard_all_async", "whether no asynchronous test may block its event loop", type="bool", default=False
    )
    parser.getgroup("loopguard").addoption(
        "--loopguard-all-async",
        action="store_true",
        help="fail every asynchronous test that blocks its event loop, as @pytest.mark.no_blocking does",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "no_blocking(threshold_ms=50): fail if the test blocks its event loop")
    config.addinivalue_line("markers", "allow_blocking: do not fail this test for it with --loopguard-all-async")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    threshold_ms = _threshold_ms(item)
    if threshold_ms is None:
        return (yield)
    watch = Watch(int(threshold_ms * 1e6))
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        item.obj = _watched(item.obj, watch)
    report = None
    with watch.watching():
        try:
            result = yield
        finally:
            if watch.blocks:
                report = _report(watch, threshold_ms)
                item.add_report_section("call", "loopguard", report)
    if report:
        pytest.fail(report, pytrace=False)
    return result


def _threshold_ms(item: pytest.Item) -> float | None:
    """None: it may block."""
    threshold = item.config.getini("loopguard_threshold_ms")
    marker = item.get_closest_marker("no_blocking")
    if marker is not None:
        if marker.args or marker.kwargs.keys() - {"threshold_ms"}:
            pytest.fail("no_blocking takes nothing but threshold_ms=MILLISECONDS", pytrace=False)
        threshold = marker.kwargs.get("threshold_ms", threshold)
    elif not _is_one_of_all(item):
        return None
    try:
        milliseconds = float(threshold)
    except (TypeError, ValueError):
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        pytest.fail(f"the threshold of loopguard must be a positive number, not {threshold!r}", pytrace=False)
    return milliseconds


def _is_one_of_all(item: pytest.Item) -> bool:
    if not (item.config.getoption("loopguard_all_async") or item.config.getini("loopguard_all_async")):
        return False
    asynchronous = isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj)
    return asynchronous and item.get_closest_marker("allow_blocking") is None


def _watched(test: Any, watch: Watch) -> Any:
    @functools.wraps(test)
    async def watched(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return await watch.run(test(*args, **kwargs))

    return watched


def _report(watch: Watch, threshold_ms: float) -> str:
    blocks = [f"  {block}" for block in watch.blocks]
    return "\n".join([f"the event loop was blocked for {threshold_ms:g} ms or longer:", *blocks])
