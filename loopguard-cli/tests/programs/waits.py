"""An event loop that waits for one thing after the other, over and over until its standard input ends.

Lines that block are marked.
"""

import asyncio
import hashlib
import socket
import subprocess
import sys
import threading
import time

WAIT_S = 0.12
listener = socket.create_server(("127.0.0.1", 0))
crunching = threading.Event()


def answer_slowly():
    while True:
        connection, _ = listener.accept()
        time.sleep(WAIT_S)
        connection.close()


def crunch():
    while crunching.is_set():
        sum([i * i for i in range(2000)])  # line: crunch


def sleeps():
    time.sleep(WAIT_S)  # line: sleeps


def sleeps_again():
    # A wait so soon after another one is not worth a copy of the stack as long as nobody knows that it is long.
    time.sleep(0.000001)
    time.sleep(WAIT_S)  # line: sleeps_again


def hashes():
    end = time.perf_counter() + WAIT_S
    while time.perf_counter() < end:
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 50_000)  # line: hashes


def reads_socket():
    with socket.create_connection(listener.getsockname()) as peer:
        peer.recv(1)  # line: reads_socket


def waits_for_child():
    subprocess.run(["sleep", str(WAIT_S)], check=True)  # line: waits_for_child


def waits_for_lock():
    with lock:  # line: waits_for_lock
        pass


def waits_for_gil():
    for _ in range(20):
        time.sleep(0.0001)  # line: waits_for_gil


lock = threading.Lock()


def hold_lock():
    with lock:
        held.set()
        time.sleep(WAIT_S)


held = threading.Event()


async def step(function):
    function()


async def main():
    while not ended.is_set():
        for function in (sleeps, sleeps_again, hashes, reads_socket, waits_for_child):
            await asyncio.create_task(step(function))
        held.clear()
        holder = threading.Thread(target=hold_lock)
        holder.start()
        held.wait()
        await asyncio.create_task(step(waits_for_lock))
        holder.join()
        crunching.set()
        cruncher = threading.Thread(target=crunch)
        cruncher.start()
        await asyncio.create_task(step(waits_for_gil))
        crunching.clear()
        cruncher.join()
        await asyncio.sleep(0.01)


ended = threading.Event()
threading.Thread(target=answer_slowly, daemon=True).start()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
print(listener.getsockname()[1], flush=True)
asyncio.run(main())
