"""A server under load: what it answers in how long, what it remembers, and whether load changes a byte.

    python benchmarks/serve_load.py
    python benchmarks/serve_load.py --model runs/shapes/bundle --seconds 30 --clients 16

Starts `armchair serve` on a free port of this machine and asks it: first one client at a time, which gives the
reference for throughput and for bytes; then many at once, of which a third goes away midway and a tenth sends garbage;
then one at a time again. Requests are pictures (most), streams with partial pictures, and edits, out of a set that is
small, so that each comes alone and under load. Ends with 1 where an answer was lost, was a failure of the server or had
other bytes than alone.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from armchair.bundle import find_bundle, read_bundle

FORMS = ("apple", "heart", "face", "car")
PROMPTS = [f"{colour} {form}" for colour in ("red", "blue", "purple", "green") for form in FORMS]
SEEDS = 3
TIMEOUT = 60.0  # seconds until an answer counts as lost


@dataclass(frozen=True)
class Ask:
    """A request whose bytes are to be the same whenever it is made."""

    kind: str  # picture, stream, edit
    prompt: str
    seed: int

    def message(self, resolution: int) -> tuple[str, str, bytes]:
        """Path, content type, body."""
        if self.kind == "edit":
            fields = {"prompt": self.prompt, "seed": str(self.seed)}
            form = multipart(fields, {"image": picture(resolution), "mask": mask(resolution)})
            return "/v1/images/edits", "multipart/form-data; boundary=b", form
        body: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed}
        if self.kind == "stream":
            body |= {"stream": True, "partial_images": 3}
        return "/v1/images/generations", "application/json", json.dumps(body).encode()


@dataclass
class Result:
    """What came of some seconds of asking."""

    seconds: float = 0.0
    processor: float = 0.0  # seconds of it that the server used
    answered: list[float] = field(default_factory=list)  # seconds each
    first_partial: list[float] = field(default_factory=list)
    statuses: Counter = field(default_factory=Counter)
    left: int = 0
    garbage: int = 0
    lost: list[str] = field(default_factory=list)
    different: list[Ask] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Pictures that were answered, a second."""
        return len(self.answered) / self.seconds

    def report(self) -> dict[str, Any]:
        ordered = sorted(self.answered)
        return {
            "seconds": round(self.seconds, 1),
            "pictures": len(ordered),
            "pictures_a_second": round(self.throughput, 2),
            "pictures_a_processor_second": round(len(ordered) / self.processor, 2),
            "median_seconds": round(statistics.median(ordered), 3),
            "p95_seconds": round(ordered[int(0.95 * (len(ordered) - 1))], 3),
            "first_partial_median_seconds": round(statistics.median(self.first_partial or [0]), 3),
            "statuses": {str(k): v for k, v in sorted(self.statuses.items())},
            "went_away": self.left,
            "garbage": self.garbage,
            "lost": len(self.lost),
            "other_bytes": len(self.different),
        }


def multipart(fields: dict[str, str], files: dict[str, bytes]) -> bytes:
    parts = [
        f'--b\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    parts += [
        f'--b\r\ncontent-disposition: form-data; name="{name}"; filename="f.png"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in files.items()
    ]
    return b"".join(parts) + b"--b--\r\n"


def picture(resolution: int) -> bytes:
    ramp = np.linspace(0, 255, resolution).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(90)), -1)
    return png(pixels)


def mask(resolution: int) -> bytes:
    pixels = np.full((resolution, resolution, 4), 255, np.uint8)
    pixels[resolution // 2 :, resolution // 4 :, 3] = 0
    return png(pixels)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def pictures_of(kind: str, body: bytes) -> list[bytes]:
    """The files in an answer; of a stream the last."""
    if kind == "stream":
        events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
        last = json.loads(events[-1])
        return [base64.b64decode(last["b64_json"])] if last["type"].endswith("completed") else []
    return [base64.b64decode(p["b64_json"]) for p in json.loads(body)["data"]]


class Client:
    """HTTP/1.1 by hand, a connection a request: cheap, and able to misbehave."""

    def __init__(self, port: int):
        self.port = port

    async def send(self, path: str, kind: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\ncontent-type: {kind}\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        return reader, writer

    async def ask(self, path: str, kind: str, body: bytes) -> tuple[int, bytes, float | None]:
        """Status, body, and when the first event with a partial picture came. Raises what a cut connection raises."""
        began, first = time.perf_counter(), None
        reader, writer = await self.send(path, kind, body)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status, chunked = int(head.split()[1]), "transfer-encoding: chunked" in head.lower()
            data = b""
            while chunk := await reader.read(1 << 16):
                data += chunk
                if first is None and b"partial_image" in data:
                    first = time.perf_counter() - began
            if chunked:
                data = _joined(data)
            else:
                expected = int(head.lower().partition("content-length:")[2].split()[0])
                if len(data) != expected:
                    raise ConnectionError(f"{len(data)} bytes of {expected}")
            return status, data, first
        finally:
            writer.close()


def _joined(data: bytes) -> bytes:
    out = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        if not (count := int(size or b"0", 16)):
            return out
        out, data = out + data[:count], data[count + 2 :]


class Load:
    def __init__(self, port: int, resolution: int):
        self.client, self.resolution = Client(port), resolution
        self.known: dict[Ask, list[bytes]] = {}

    async def one(self, ask: Ask, result: Result) -> None:
        path, kind, body = ask.message(self.resolution)
        began = time.perf_counter()
        try:
            status, data, first = await asyncio.wait_for(self.client.ask(path, kind, body), TIMEOUT)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            result.lost.append(f"{ask}: {type(error).__name__} {error}")
            return
        result.statuses[status] += 1
        if status == 429:
            await asyncio.sleep(0.5)
            return
        if status != 200:
            result.lost.append(f"{ask}: {status} {data[:200]!r}")
            return
        result.answered.append(time.perf_counter() - began)
        if first is not None and ask.kind == "stream":
            result.first_partial.append(first)
        files = pictures_of(ask.kind, data)
        if not files:
            result.lost.append(f"{ask}: no picture")
        elif self.known.setdefault(ask, files) != files:
            result.different.append(ask)

    async def alone(self, asks: list[Ask]) -> Result:
        result, began = Result(), time.perf_counter()
        for ask in asks:
            await self.one(ask, result)
        result.seconds = time.perf_counter() - began
        return result

    async def together(self, asks: list[Ask], clients: int, seconds: float, seed: int, most: int) -> Result:
        result, began = Result(), time.perf_counter()
        budget = iter(range(most))

        async def client(i: int) -> None:
            rng = random.Random(f"{seed} {i}")
            while time.perf_counter() < began + seconds and next(budget, None) is not None:
                chance = rng.random()
                if chance < 0.1:
                    await self.garbage(rng, result)
                elif chance < 0.1 + 0.9 / 3:
                    await self.leave(rng.choice(asks), rng, result)
                else:
                    await self.one(rng.choice(asks), result)

        await asyncio.gather(*map(client, range(clients)))
        result.seconds = time.perf_counter() - began
        return result

    async def leave(self, ask: Ask, rng: random.Random, result: Result) -> None:
        with contextlib.suppress(OSError):
            _, writer = await self.client.send(*ask.message(self.resolution))
            await asyncio.sleep(rng.uniform(0.02, 1.5))
            writer.transport.abort()
            result.left += 1

    async def garbage(self, rng: random.Random, result: Result) -> None:
        """Anything but a request; what answers has to say that it is wrong."""
        path, kind, body = rng.choice(
            [
                ("/v1/images/generations", "application/json", rng.randbytes(200)),
                ("/v1/images/generations", "application/json", b'{"prompt": 3, "n": 1e400}'),
                ("/v1/images/edits", "multipart/form-data; boundary=b", rng.randbytes(5000)),
                ("/v1/images/edits", "multipart/form-data; boundary=b", multipart({}, {"image": rng.randbytes(999)})),
                ("/v1/images/../../etc/passwd", "text/plain", b"x"),
            ]
        )
        try:
            status, data, _ = await asyncio.wait_for(self.client.ask(path, kind, body), TIMEOUT)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            result.lost.append(f"garbage: {type(error).__name__} {error}")
            return
        result.garbage += 1
        result.statuses[status] += 1
        if not 400 <= status < 500:
            result.lost.append(f"garbage: {status} {data[:200]!r}")


@contextlib.contextmanager
def running(
    model: str | None, *flags: str, cwd: Path | None = None, **environment: str
) -> Iterator[tuple[subprocess.Popen, int]]:
    """`armchair serve` on a free port, and the port; `environment` is added to this process's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "armchair", "serve", "--port", str(port), *flags]
    command += [] if model is None else ["--model", model]
    server = subprocess.Popen(command, cwd=cwd, env={**os.environ, **environment})
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as link:
                link.sendall(f"GET /ready HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n\r\n".encode())
                if link.recv(100).startswith(b"HTTP/1.1 200"):
                    break
            if server.poll() is not None:
                sys.exit("the server ended")
            time.sleep(0.1)
        yield server, port
    finally:
        server.terminate()
        server.wait(60)


def memory(server: subprocess.Popen) -> float:
    """Resident MiB."""
    pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def processor_seconds(server: subprocess.Popen) -> float:
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(args.seed)
    kinds = ["picture"] * 13 + ["stream"] * 2 + ["edit"]
    asks = sorted({Ask(rng.choice(kinds), p, s) for p in PROMPTS for s in range(SEEDS)}, key=str)
    rng.shuffle(asks)
    resolution = int(read_bundle(find_bundle(args.model)).info["recipe"]["image_tokenizer"]["resolution"])
    with running(args.model) as (server, port):
        load = Load(port, resolution)

        def timed(work: Coroutine[Any, Any, Result]) -> Result:
            used = processor_seconds(server)
            result = asyncio.run(work)
            result.processor = processor_seconds(server) - used
            return result

        start = memory(server)
        asyncio.run(load.alone(asks[:4]))
        alone = timed(load.alone(asks))
        asyncio.run(load.together(asks, args.clients, args.warm, args.seed + 1, args.most))
        before = memory(server)
        together = timed(load.together(asks, args.clients, args.seconds, args.seed, args.most))
        time.sleep(2)
        after, alive = memory(server), server.poll() is None
        again = timed(load.alone(asks))
    one_by_one = Result(seconds=alone.seconds + again.seconds, processor=alone.processor + again.processor)
    one_by_one.answered = alone.answered + again.answered
    return {
        "clients": args.clients,
        "alone": alone.report(),
        "together": together.report(),
        "again": again.report(),
        "times_the_throughput": round(together.throughput / one_by_one.throughput, 2),
        "times_the_pictures_a_processor_second": round(
            len(together.answered) / together.processor / (len(one_by_one.answered) / one_by_one.processor), 2
        ),
        "cores_used_together": round(together.processor / together.seconds, 2),
        "memory_mib": {"start": round(start, 1), "before": round(before, 1), "after": round(after, 1)},
        "memory_growth_percent": round(100 * (after / before - 1), 2),
        "alive": alive,
        "ended_with": server.returncode,
        "wrong": (together.lost + alone.lost + again.lost)[:10],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--warm", type=float, default=20, help="seconds of the same load before memory is looked at")
    parser.add_argument("--most", type=int, default=20_000, help="requests at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args)
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    wrong = found["together"]["lost"] + found["together"]["other_bytes"] + found["again"]["other_bytes"]
    if wrong or not found["alive"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
