"""Event loops that are blocked by short waits nearly all the time: each wait is worth a capture.

usage: many_waits.py LOOPS WAIT_MS
Each loop has a thread of its own and waits ten times in each of its steps. Prints `ready` and runs until it is ended.
"""

import asyncio
import sys
import threading
import time

WAITS = 10


async def waits(wait_s: float) -> None:
    for _ in range(WAITS):
        time.sleep(wait_s)  # noqa: ASYNC251


async def loop(wait_s: float) -> None:
    while True:
        await asyncio.create_task(waits(wait_s))
        await asyncio.sleep(0.001)


def main() -> None:
    loops, wait_s = int(sys.argv[1]), float(sys.argv[2]) / 1000
    for _ in range(loops):
        threading.Thread(target=lambda: asyncio.run(loop(wait_s)), daemon=True).start()
    print("ready", flush=True)
    threading.Event().wait()


main()
