"""Runs one event loop, and a second one in a thread once a line comes on standard input. The second one blocks."""

import asyncio
import sys
import threading
import time


async def second():
    for _ in range(3):
        await asyncio.sleep(0.05)
        time.sleep(0.3)
    print("done", flush=True)


async def first():
    await asyncio.to_thread(sys.stdin.readline)
    thread = threading.Thread(target=lambda: asyncio.run(second()), name="second")
    thread.start()
    await asyncio.to_thread(sys.stdin.read)


print("ready", flush=True)
asyncio.run(first())
