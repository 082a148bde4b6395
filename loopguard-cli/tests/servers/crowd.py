"""A small asyncio server in a process that has very much of one thing.

Run as `python crowd.py PORT KIND COUNT`, with KIND one of `threads` (that sleep), `loops` (asyncio's, a thread each)
and `regions` (of memory). `/block` blocks its loop for 100 ms. It serves once all of them are there.
"""

import asyncio
import mmap
import sys
import threading
import time

STACK_BYTES = 128 * 1024
keep: list[object] = []


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if b"/block" in await reader.readline():
        block()
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\ndone")
    await writer.drain()
    writer.close()


def block() -> None:
    time.sleep(0.1)


async def idle() -> None:
    while True:
        await asyncio.sleep(0.5)


def start(kind: str, count: int) -> None:
    threading.stack_size(STACK_BYTES)
    for number in range(count):
        if kind == "regions":
            # Neighbours with the same protection would become one region.
            protection = mmap.PROT_READ if number % 2 else mmap.PROT_READ | mmap.PROT_WRITE
            keep.append(mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=protection))
            continue
        sleeper = threading.Event().wait if kind == "threads" else lambda: asyncio.run(idle())
        threading.Thread(target=sleeper, daemon=True).start()


async def main() -> None:
    port, kind, count = sys.argv[1:]
    start(kind, int(count))
    server = await asyncio.start_server(answer, "127.0.0.1", int(port), backlog=1000)
    await server.serve_forever()


asyncio.run(main())
