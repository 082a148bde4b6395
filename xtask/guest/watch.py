"""Runs in a guest: a server blocks on purpose, loopguard watches it, and what it said goes to standard output.

usage: watch.py LOOPGUARD APP LOOP. Every line is `TAG text`; the host judges them.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PORT = 8000
# An emulated processor is slow: what blocks on purpose must be far longer than what does not.
THRESHOLD = "150ms"
# The first is only explained if the sampling clock of its processor ticks.
BLOCKS = ["/block/cpu/500", "/block/sleep/500", "/block/nested/600", "/block/sleep/700"]
WARM_UP = ["/fine/warm", "/block/sleep/0", "/block/cpu/0", "/block/nested/0"] * 2
# Mostly for the verifier: old kernels take a long time, and an emulated processor takes twenty times as long.
PATIENCE_S = 600
# The server's processor from the first block on.
PROCESSOR = 1


def say(tag: str, text: str) -> None:
    print(f"{tag} {text}", flush=True)


def wait_until(what: str, is_so: object, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not is_so():  # type: ignore[operator]
        if process.poll() is not None:
            sys.exit(f"FAILED {what}: the process ended with {process.returncode}")
        if time.monotonic() > end:
            sys.exit(f"FAILED {what}: not within {PATIENCE_S} s")
        time.sleep(0.1)


def answers() -> bool:
    try:
        socket.create_connection(("127.0.0.1", PORT), 5).close()
    except OSError:
        return False
    return True


def get(path: str, request_id: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=PATIENCE_S)
    connection.request("GET", path, headers={"x-request-id": request_id})
    status = connection.getresponse().status
    connection.close()
    say("SENT", json.dumps({"path": path, "id": request_id, "status": status}))


def replace_processor(server: int) -> None:
    """What a suspended machine does to all processors but one: this one goes and comes back. The server moves there."""
    switch = Path(f"/sys/devices/system/cpu/cpu{PROCESSOR}/online")
    for state in "01":
        switch.write_text(state)
    # loopguard looks five times a second, of a slow processor's time.
    time.sleep(5)
    for thread in Path(f"/proc/{server}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {PROCESSOR})


def main() -> None:
    loopguard, app, event_loop = sys.argv[1:]
    server = subprocess.Popen(
        [sys.executable, app, "uvicorn-h11", event_loop, str(PORT)],
        stdin=subprocess.PIPE,
    )
    wait_until("the server answers", answers, server)
    for path in WARM_UP:
        get(path, "warm-up")
    doctor = subprocess.run([loopguard, "doctor", "--pid", str(server.pid)], capture_output=True, text=True)
    for line in (doctor.stdout + doctor.stderr).splitlines():
        say("DOCTOR", line)
    say("DOCTOR-EXIT", str(doctor.returncode))
    say("UPTIME", Path("/proc/uptime").read_text().split()[0])
    events, messages = Path("/tmp/events.jsonl"), Path("/tmp/messages")
    with messages.open("wb") as stderr:
        watching = subprocess.Popen(
            [
                loopguard,
                "attach",
                f"--pid={server.pid}",
                f"--threshold={THRESHOLD}",
                "--format=jsonl",
                "--output",
                events,
            ],
            stdin=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        wait_until("loopguard watches", lambda: "watching process" in messages.read_text(), watching)
        say("UPTIME", Path("/proc/uptime").read_text().split()[0])
        replace_processor(server.pid)
        for number, path in enumerate(BLOCKS):
            get(path, f"guest-{number}")
        # A step ends after its answer is sent: once another request is answered, it has.
        get("/fine/last", "warm-up")
        watching.send_signal(signal.SIGTERM)
        watching.wait(PATIENCE_S)
        for line in events.read_text().splitlines():
            say("EVENT", line)
        say("EXIT", str(watching.returncode))
    finally:
        for line in messages.read_text().splitlines():
            say("MESSAGE", line)
        if watching.poll() is None:
            watching.kill()
        server.kill()


main()
