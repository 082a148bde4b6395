"""A loop that shares one processor with others that never sleep.

Each line on standard input makes the loop block for 80 ms or more, most of which it spends waiting for the processor;
then it says from when to when, in nanoseconds.
"""

import asyncio
import os
import signal
import sys
import time

parent = os.getpid()
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def compete() -> int:
    """Starts a process that runs for as long as this one lives."""
    pid = os.fork()
    if pid == 0:
        while os.getppid() == parent:
            pass
        os._exit(0)
    return pid


def kept_waiting() -> tuple[int, int]:
    began = time.monotonic_ns()
    enough, until = time.thread_time() + 0.015, time.monotonic() + 0.08
    while time.thread_time() < enough or time.monotonic() < until:
        pass
    return began, time.monotonic_ns()


async def main() -> None:
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(*kept_waiting(), flush=True)


others = [compete() for _ in range(4)]
try:
    asyncio.run(main())
finally:
    for other in others:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
