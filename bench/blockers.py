"""Blocks an asyncio loop in one way, again and again: a target whose stacks are to be complete.

usage: blockers.py KIND
Prints `ready` and runs until it is ended.
"""

import asyncio
import hashlib
import os
import socket
import sqlite3
import sys
import threading
import time
import zlib
from collections.abc import Callable

BLOCK_S = 0.24
WAIT_S = 0.006
BYTES = os.urandom(1 << 20)
RECURSION = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 20000) SELECT sum(n * n) FROM r"


def answer_slowly(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    while connection.recv(1):
        time.sleep(WAIT_S)
        connection.sendall(b"x")


def connected() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=answer_slowly, args=(listener,), daemon=True).start()
    return socket.create_connection(listener.getsockname())


def make(kind: str) -> Callable[[], object]:
    """What is done over and over within one block."""
    if kind == "sleep":
        return lambda: time.sleep(WAIT_S)
    if kind == "socket":
        peer = connected()

        def ask() -> None:
            peer.sendall(b"x")
            peer.recv(1)

        return ask
    if kind == "python":
        return lambda: sum([i * i for i in range(1000)])
    if kind == "hashlib":
        return lambda: (hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2000), hashlib.sha256(BYTES).digest())
    if kind == "zlib":
        return lambda: zlib.compress(BYTES[: 1 << 18], 6)
    if kind == "sqlite3":
        database = sqlite3.connect(":memory:")
        return lambda: database.execute(RECURSION).fetchall()
    if kind == "numpy":
        import numpy

        matrix = numpy.random.default_rng(7).random((120, 120))
        return lambda: (numpy.linalg.svd(matrix), numpy.sort(matrix, axis=None), numpy.sin(matrix).sum())
    raise SystemExit(f"no kind {kind}")


async def block(work: Callable[[], object]) -> None:
    end = time.perf_counter() + BLOCK_S
    while time.perf_counter() < end:
        work()


async def main() -> None:
    work = make(sys.argv[1])
    print("ready", flush=True)
    while True:
        await asyncio.create_task(block(work))
        await asyncio.sleep(0.005)


asyncio.run(main())
