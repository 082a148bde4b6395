"""A bounded load with a seed: the same arguments send the same requests in the same order.

Clients send one request after the other and think in between, for a random time. Profiles:
realistic: 3 % of the requests block, a client thinks for 100 ms on average; mixed: 25 % block, 400 ms.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import aiohttp


@dataclass(frozen=True)
class Profile:
    blocking_share: float
    think_s: float
    sleeps_ms: tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    method: str
    path: str
    durations_ms: tuple[int, ...]
    weight: int


PROFILES = {"realistic": Profile(0.03, 0.1, (200, 300, 400)), "mixed": Profile(0.25, 0.4, (0, 20, 100))}
CLIENTS = 30
BLOCKS_MS = (15, 25, 35, 70, 100, 200)
HARMLESS = [
    Kind("GET", "/hello", (), 15),
    Kind("GET", "/ok/pool", (40, 60, 120), 8),
    Kind("GET", "/ok/dependency", (60,), 5),
    Kind("GET", "/ok/thread", (80,), 5),
    Kind("GET", "/ok/stream", (60,), 7),
]
BLOCKING = [
    Kind("POST" if name == "hash" else "GET", f"/block/{name}", BLOCKS_MS, weight)
    for name, weight in [
        ("sleep", 3),
        ("between", 3),
        ("cpu", 2),
        ("hash", 2),
        ("file", 2),
        ("socket", 2),
        ("lock", 2),
        ("gil", 2),
        ("nested", 2),
        ("gather", 2),
        ("dependency", 2),
        ("stream", 2),
    ]
] + [Kind("GET", "/block/cuts", (15,), 1)]


@dataclass(frozen=True)
class Order:
    id: str
    method: str
    path: str
    think_s: float


def orders(profile: Profile, seed: int) -> Iterator[Order]:
    chance = random.Random(seed)
    harmless = [*HARMLESS, Kind("GET", "/ok/sleep", profile.sleeps_ms, 60)]
    number = 0
    while True:
        kinds = BLOCKING if chance.random() < profile.blocking_share else harmless
        kind = chance.choices(kinds, [kind.weight for kind in kinds])[0]
        path = f"{kind.path}/{chance.choice(kind.durations_ms)}" if kind.durations_ms else kind.path
        yield Order(f"s{seed}-{number:05d}", kind.method, path, chance.expovariate(1) * profile.think_s)
        number += 1


async def send(session: aiohttp.ClientSession, order: Order) -> bool:
    body = b"payload" if order.method == "POST" else None
    try:
        async with session.request(order.method, order.path, headers={"x-request-id": order.id}, data=body) as response:
            await response.read()
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def warm_up(session: aiohttp.ClientSession) -> None:
    """Imports that first requests bring are nobody's blocks."""
    for kind in [*HARMLESS, *BLOCKING]:
        await send(session, Order("warm-up", kind.method, f"{kind.path}/1" if kind.durations_ms else kind.path, 0))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--profile", choices=PROFILES, default="realistic")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--warm-up", action="store_true", help="send one request of each kind and end")
    arguments = parser.parse_args()
    plan = orders(PROFILES[arguments.profile], arguments.seed)
    started = time.monotonic()
    answered = failed = 0
    async with aiohttp.ClientSession(
        f"http://127.0.0.1:{arguments.port}",
        timeout=aiohttp.ClientTimeout(total=30),
        connector=aiohttp.TCPConnector(limit=arguments.clients),
    ) as session:
        if arguments.warm_up:
            await warm_up(session)
            return

        async def client() -> None:
            nonlocal answered, failed
            for order in plan:
                await asyncio.sleep(order.think_s)
                if time.monotonic() - started > arguments.seconds:
                    return
                if await send(session, order):
                    answered += 1
                else:
                    failed += 1

        await asyncio.gather(*(client() for _ in range(arguments.clients)))
    elapsed = time.monotonic() - started
    print(json.dumps({"answered": answered, "failed": failed, "requests_per_second": round(answered / elapsed, 1)}))


asyncio.run(main())
