"""Healthy event loops, each on a thread of its own, that tick at a steady rate.

usage: many_loops.py LOOPS TICKS_PER_SECOND
All loops together tick about so often; each tick is a timer that has run out, after sleep. About twice a second a JSON
line says how many ticks there were since the last one, in how many seconds, and how much CPU time the process used for
them.
"""

import asyncio
import json
import sys
import threading
import time

LINE_S = 0.5


class Ticks:
    def __init__(self) -> None:
        self.count = 0


def run(ticks: Ticks, period_s: float) -> None:
    loop = asyncio.new_event_loop()

    def tick() -> None:
        ticks.count += 1
        loop.call_later(period_s, tick)

    loop.call_later(period_s, tick)
    loop.run_forever()


def main() -> None:
    loops, rate = int(sys.argv[1]), float(sys.argv[2])
    # A counter for each: they would overwrite each other's.
    counters = [Ticks() for _ in range(loops)]
    for counter in counters:
        threading.Thread(target=run, args=(counter, loops / rate), daemon=True).start()

    def now() -> tuple[int, int, float]:
        return sum(counter.count for counter in counters), time.process_time_ns(), time.monotonic()

    last = now()
    while True:
        time.sleep(LINE_S)
        this = now()
        ticks, cpu_ns, seconds = (after - before for after, before in zip(this, last, strict=True))
        print(json.dumps({"ticks": ticks, "cpu_ns": cpu_ns, "seconds": seconds}), flush=True)
        last = this


main()
