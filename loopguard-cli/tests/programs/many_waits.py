"""An event loop that waits for a millisecond at a time, many times in each step, until its standard input ends."""

import asyncio
import sys
import threading
import time


async def waits():
    for _ in range(100):
        time.sleep(0.001)


async def main():
    while not ended.is_set():
        await asyncio.create_task(waits())
        await asyncio.sleep(0.001)


ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
print("ready", flush=True)
asyncio.run(main())
