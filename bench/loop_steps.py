"""Measures what one tick and one step of an event loop cost, over and over. usage: loop_steps.py uvloop|asyncio

A tick here is one trip around the loop with one callback in it. A step is one callback among a hundred in the same
tick. Both are CPU time of the loop's thread divided by their number, the least of many rounds: what disturbs a round
only adds to it. A JSON line with both comes about twice a second. "block" on standard input blocks the loop three
times for 150 ms.
"""

import asyncio
import json
import sys
import threading
import time

import uvloop

CALLBACKS = 10_000
BATCH = 100
ROUNDS = 15
BLOCK_S = 0.15

Loop = asyncio.AbstractEventLoop


def one_a_tick(loop: Loop) -> float:
    left = CALLBACKS

    def step() -> None:
        nonlocal left
        left -= 1
        if left:
            loop.call_soon(step)
        else:
            loop.stop()

    loop.call_soon(step)
    return timed(loop)


def many_a_tick(loop: Loop) -> float:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if done % BATCH:
            return
        if done == CALLBACKS:
            loop.stop()
            return
        for _ in range(BATCH):
            loop.call_soon(step)

    for _ in range(BATCH):
        loop.call_soon(step)
    return timed(loop)


def timed(loop: Loop) -> float:
    start = time.thread_time_ns()
    loop.run_forever()
    return (time.thread_time_ns() - start) / CALLBACKS


def block(loop: Loop) -> None:
    for at in range(3):
        loop.call_later(0.05 + at * 2 * BLOCK_S, time.sleep, BLOCK_S)
    loop.call_later(8 * BLOCK_S, loop.stop)
    loop.run_forever()


def main() -> None:
    loop = uvloop.new_event_loop() if sys.argv[1] == "uvloop" else asyncio.new_event_loop()
    asked = threading.Event()

    def listen() -> None:
        for _ in sys.stdin:
            asked.set()

    threading.Thread(target=listen, daemon=True).start()
    while True:
        if asked.is_set():
            asked.clear()
            block(loop)
        # Taking turns, so that both see the same moments of the machine.
        ticks, steps = zip(*((one_a_tick(loop), many_a_tick(loop)) for _ in range(ROUNDS)), strict=True)
        print(json.dumps({"tick_ns": min(ticks), "step_ns": min(steps)}), flush=True)


main()
