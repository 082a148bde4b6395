"""Two loops, one after the other, and what a script does besides."""

import asyncio
import sys
import time


def first() -> None:
    time.sleep(0.15)


def second() -> None:
    time.sleep(0.15)


def without_a_loop() -> None:
    time.sleep(0.15)


async def watched_first() -> None:
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    first()
    await asyncio.sleep(0.05)


async def then() -> None:
    await asyncio.sleep(0.05)
    second()
    await asyncio.sleep(0.05)


asyncio.run(watched_first())
without_a_loop()
asyncio.run(then())
without_a_loop()
