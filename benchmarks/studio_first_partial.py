"""How long the studio's page waits for something to look at: seconds from the request to the first partial picture.

    python benchmarks/studio_first_partial.py [--model M] [--rounds N]

A warm server in a process of its own, four candidates, one request at a time, as the page sends it.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a bundle (default: the shipped one)")
    parser.add_argument("--rounds", type=int, default=11, help="requests that are timed (default: 11)")
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "armchair", "serve", "--port", str(port), "--data", data]
        server = subprocess.Popen(command + (["--model", args.model] if args.model else []))
        try:
            wait_until_ready(port)
            timed = [times(port, seed) for seed in range(args.rounds + 1)][1:]  # the first opens what is opened lazily
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
    for name, values in zip(("first partial picture", "done and kept"), zip(*timed, strict=True), strict=True):
        print(f"{name}: median {statistics.median(values):.3f} s, worst {max(values):.3f} s of {args.rounds}")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


def wait_until_ready(port: int) -> None:
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise SystemExit("the server did not get ready in two minutes")


def times(port: int, seed: int) -> tuple[float, float]:
    """Seconds until the first partial pictures are there, and until the drawing is."""
    wish = json.dumps({"prompt": "a red apple", "candidates": 4, "seed": str(seed)})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    began = time.perf_counter()
    connection.request("POST", "/studio/draw", wish, {"content-type": "application/json"})
    answer = connection.getresponse()
    first = None
    for line in answer:
        if line.startswith(b"event: partial") and first is None:
            answer.readline()  # its pictures
            first = time.perf_counter() - began
        if line.startswith(b"event: done"):
            answer.readline()
            return first or 0.0, time.perf_counter() - began
    raise SystemExit("the server's answer ended early")


if __name__ == "__main__":
    main()
