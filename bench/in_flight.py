"""Keeps requests in flight and sends others meanwhile. usage: in_flight.py PORT

Reads commands, one a line, and answers each with `done`, or ends:
open N          has N requests in flight from now on, which sleep on the server
get N PATH      sends N requests one after the other on one connection
"""

import asyncio
import resource
import sys

# Longer than any benchmark.
SLEEP_MS = 3_600_000
AT_ONCE = 100
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(port: int) -> Connection:
    return await asyncio.open_connection("127.0.0.1", port)


def request(path: str, name: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: bench\r\nx-request-id: {name}\r\n\r\n".encode()


async def answer(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"the server answers {head!r}")
    lengths = [line.split(b":")[1] for line in head.lower().splitlines() if line.startswith(b"content-length:")]
    await reader.readexactly(int(lengths[0]))


async def main() -> None:
    port = int(sys.argv[1])
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    sleeping: list[Connection] = []
    reader, writer = await connect(port)

    async def sleep(number: int) -> Connection:
        connection = await connect(port)
        connection[1].write(request(f"/ok/sleep/{SLEEP_MS}", f"sleeps-{number}"))
        return connection

    while line := await asyncio.to_thread(sys.stdin.readline):
        match line.split():
            case ["open", count]:
                while len(sleeping) < int(count):
                    at = len(sleeping)
                    more = min(AT_ONCE, int(count) - at)
                    sleeping += await asyncio.gather(*(sleep(at + n) for n in range(more)))
                # Answered after those that came before it, as far as they do not sleep.
                writer.write(request("/hello", "after"))
                await answer(reader)
            case ["get", count, path]:
                for number in range(int(count)):
                    writer.write(request(path, f"get-{number}"))
                    await answer(reader)
            case _:
                raise SystemExit(f"don't know {line!r}")
        print("done", flush=True)


asyncio.run(main())
