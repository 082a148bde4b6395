"""Puts fastapi-loopguard's middleware into the app and writes down what it reports, one JSON object a line.

It wraps `SentinelMonitor._handle_blocking`, through which all it reports must pass, and changes nothing in what is
decided. Its own request ids are mapped to the load's by a small middleware inside it.
"""

import json
import time
from typing import Any

from fastapi import FastAPI
from fastapi_loopguard import LoopGuardConfig, LoopGuardMiddleware, monitor
from truth import Application, Receive, Send

_load_ids: dict[str, str] = {}


class _MapIds:
    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            own = scope.get("state", {}).get("loopguard_request_id")
            load = next((value.decode() for name, value in scope["headers"] if name == b"x-request-id"), None)
            if own and load:
                _load_ids[own] = load
        await self._app(scope, receive, send)


def install(api: FastAPI, reports: str | None) -> None:
    config = LoopGuardConfig(enforcement_mode="log", prometheus_enabled=False)
    if reports:
        _write_down(reports, config)
        # What is added first is inside.
        api.add_middleware(_MapIds)
    api.add_middleware(LoopGuardMiddleware, config=config)


def _write_down(reports: str, config: LoopGuardConfig) -> None:
    # By line: uvicorn leaves at SIGTERM without closing files.
    file = open(reports, "w", buffering=1)  # noqa: SIM115
    handle = monitor.SentinelMonitor._handle_blocking

    def write_and_handle(self: monitor.SentinelMonitor, lag_ms: float, is_cumulative: bool = False) -> Any:  # noqa: ANN401
        end = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        # A cumulative event's lag is a sum over its window, not one interval.
        span_ms = config.cumulative_window_ms if is_cumulative else lag_ms
        blamed = [_load_ids.get(request.request_id, request.request_id) for request in monitor.get_active_requests()]
        report = {
            "type": "block",
            "event": "cumulative" if is_cumulative else "single",
            "t_start_ns": end - int(span_ms * 1e6),
            "t_end_ns": end,
            "duration_ms": lag_ms,
            "requests": [{"id": request} for request in blamed],
        }
        file.write(json.dumps(report) + "\n")
        return handle(self, lag_ms, is_cumulative)

    monitor.SentinelMonitor._handle_blocking = write_and_handle
