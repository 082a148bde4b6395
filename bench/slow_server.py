"""A TCP server on 127.0.0.1 that reads "MILLISECONDS\\n" and answers after that long. usage: slow_server.py PORT"""

import asyncio
import sys


async def answer_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        line = await asyncio.wait_for(reader.readline(), 5)
        await asyncio.sleep(float(line) / 1000)
        writer.write(b"ok\n")
        await writer.drain()
    except (TimeoutError, ValueError, ConnectionError):
        pass
    finally:
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(answer_late, "127.0.0.1", int(sys.argv[1]))
    async with server:
        await server.serve_forever()


asyncio.run(main())
