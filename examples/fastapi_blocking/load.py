"""Plays the world around app.py: its clients, and the slow payment service it calls.

    python load.py --port 8000 [--payments-port 8001] [--seconds 60] [--clients 12] [--seed 1]

The same seed gives the same requests in the same order to each client. Each client sends one request, thinks, and
sends the next, so the load is bounded whatever the server does. Ends with one line that counts what happened.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass

HOST = "127.0.0.1"
PAYMENT_TAKES_S = 0.06
THINK_S = 0.15
ANSWER_WITHIN_S = 10.0


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    weight: int
    body: bytes = b""


CALLS = [
    Call("GET", "/health", 20),
    Call("GET", "/items/{n}", 40),
    Call("GET", "/recommendations", 10),
    Call("GET", "/me?user=ada", 8),
    Call("GET", "/statement", 6),
    Call("GET", "/reports-fixed/day-{n}", 6),
    Call("GET", "/reports/day-{n}", 2),
    Call("POST", "/orders", 2, b'{"item": 7, "quantity": 2}'),
    Call("POST", "/login", 2, b'{"user": "ada", "password": "correct horse"}'),
    Call("GET", "/catalogue/export", 2),
    Call("POST", "/uploads", 2, b"x" * 1024 * 1024),
]


async def pay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The payment service: answers every request on a connection of its own, slowly."""
    try:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(PAYMENT_TAKES_S)
        body = json.dumps({"paid": True}).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def ask(port: int, call: Call, number: int, request_id: str) -> int:
    """Sends one request on a connection of its own and returns the status."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        head = (
            f"{call.method} {call.path.format(n=number)} HTTP/1.1\r\nHost: {HOST}\r\n"
            f"X-Request-ID: {request_id}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(call.body)}\r\n\r\n"
        )
        writer.write(head.encode() + call.body)
        await writer.drain()
        status_line = await reader.readline()
        while await reader.read(64 * 1024):
            pass
        return int(status_line.split()[1])
    finally:
        writer.close()


async def client(name: int, port: int, seed: int, until: float, outcomes: Counter[str]) -> None:
    choice = random.Random(f"{seed}-{name}")
    for number in range(1, 1_000_000):
        await asyncio.sleep(choice.expovariate(1 / THINK_S))
        if time.monotonic() >= until:
            return
        call = choice.choices(CALLS, [call.weight for call in CALLS])[0]
        request_id = f"c{name:02}-{number:04}"
        try:
            status = await asyncio.wait_for(ask(port, call, choice.randint(1, 2000), request_id), ANSWER_WITHIN_S)
            outcomes[str(status)] += 1
        except (OSError, IndexError, ValueError) as error:
            outcomes[type(error).__name__] += 1


async def main() -> None:
    arguments = argparse.ArgumentParser(description="Bounded load for app.py, and the payment service it calls.")
    arguments.add_argument("--port", type=int, required=True, help="where app.py listens")
    arguments.add_argument("--payments-port", type=int, default=8001, help="where to play the payment service")
    arguments.add_argument("--seconds", type=float, default=60.0)
    arguments.add_argument("--clients", type=int, default=12)
    arguments.add_argument("--seed", type=int, default=1)
    options = arguments.parse_args()

    outcomes: Counter[str] = Counter()
    until = time.monotonic() + options.seconds
    async with await asyncio.start_server(pay, HOST, options.payments_port):
        clients = (client(name, options.port, options.seed, until, outcomes) for name in range(options.clients))
        await asyncio.gather(*clients)
    print(json.dumps({"requests": sum(outcomes.values()), "outcomes": dict(outcomes)}))


if __name__ == "__main__":
    asyncio.run(main())
