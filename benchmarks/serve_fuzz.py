"""Requests that nobody should send, by the thousand, at a server: none may make it fail, hang or touch a file.

    python benchmarks/serve_fuzz.py --requests 10000
    python benchmarks/serve_fuzz.py --requests 200 --seed 3

Starts `armchair serve` on a free port of this machine, in an empty folder, and sends what a seed makes up: forms that
are cut short, fields of wrong types, numbers without end, pictures of 50 megapixels, zip bombs, names that climb out of
folders, odd Unicode, broken HTTP. Ends with 1 where an answer had a status of 500 or more, took too long, or where a
file is in the server's folder, or in the one for temporary files, that was not there before.
"""

import argparse
import asyncio
import contextlib
import gzip
import io
import json
import os
import random
import string
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from serve_load import Client, mask, memory, multipart, picture, png, running  # noqa: E402

TIMEOUT = 30.0  # seconds until an answer counts as a hang
ODD = ["", " ", "\0", "\x7f\x1b[31m", "🍎" * 50, "e" + "\u0301" * 300, "\u202egnp.x", "\ufeff", "ﷺ" * 99, "\\ud800"]
PATHS = ["../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "..%2f..%2f", "C:\\boot.ini", "emoji/../../x"]
HALF_CLOSED = ("form_cut_short", "length_wrong", "http_damaged")  # after these the client says that no more will come
FIELDS = ("prompt", "n", "size", "seed", "model", "candidates", "temperature", "top_k", "top_p", "min_p", "guidance")
FIELDS += ("response_format", "output_format", "output_compression", "stream", "partial_images", "quality", "user")
FIELDS += ("background", "keep_top", "svg", "moderation", "safety_identifier")


class Fuzz:
    """Requests out of a seed; each method gives the bytes of one."""

    def __init__(self, seed: int, resolution: int):
        self.rng, self.resolution = random.Random(seed), resolution
        self.image, self.mask = picture(resolution), mask(resolution)
        self.bomb = declared_png(50_000, 1_000, b"\0" * 1000)
        self.large = declared_png(9_000, 6_000, zlib.compress(b"\0" * (9_000 * 3 + 1) * 6_000, 9))
        self.text_bomb = text_bomb(self.image)
        self.kinds: list[Callable[[], bytes]] = [
            self.json_of_wrong_types,
            self.json_of_wrong_types,
            self.json_damaged,
            self.json_deep,
            self.form_of_wrong_types,
            self.form_of_wrong_types,
            self.form_cut_short,
            self.form_damaged,
            self.pictures_damaged,
            self.pictures_bombs,
            self.masks,
            self.packed,
            self.paths,
            self.http_damaged,
            self.length_wrong,
        ]

    def next(self) -> tuple[str, bytes]:
        make = self.rng.choice(self.kinds)
        return make.__name__, make()

    def value(self, depth: int = 0) -> Any:
        rng = self.rng
        plain = [
            None, True, False, 0, 1, -1, 10, 11, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308, 1e-320,
            float("nan"), float("inf"), "1", "auto", "64x64", "128x128", "1024x1024", "0x0", "99999999999x1", "-64x-64",
            "64X64", "b64_json", "url", "png", "webp", "svg", "high", rng.choice(ODD), rng.choice(PATHS), "x" * 40_000,
            "".join(rng.choices(string.printable, k=rng.randrange(80))), chr(rng.randrange(0x20, 0xD7FF)) * 9,
        ]  # fmt: skip
        if depth < 3 and rng.random() < 0.1:
            return [self.value(depth + 1) for _ in range(3)]
        if depth < 3 and rng.random() < 0.1:
            return {str(self.value(3)): self.value(depth + 1) for _ in range(3)}
        return rng.choice(plain)

    def fields(self) -> dict[str, Any]:
        rng = self.rng
        chosen = {name: self.value() for name in rng.sample(FIELDS, rng.randrange(5))}
        if rng.random() < 0.7:
            chosen["prompt"] = rng.choice(["a red apple", *ODD])
        if rng.random() < 0.2:
            chosen[rng.choice(["temprature", "__proto__", "image", "mask", "", "🍎", "n[]"])] = self.value()
        return chosen

    def post(self, path: str, kind: str, body: bytes, *more: str, length: int | None = None) -> bytes:
        lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", f"content-type: {kind}", "connection: close", *more]
        lines.append(f"content-length: {len(body) if length is None else length}")
        return "\r\n".join(lines).encode("utf-8", "replace") + b"\r\n\r\n" + body

    def form(self, fields: dict[str, Any], files: dict[str, bytes], path: str | None = None) -> bytes:
        return self.post(path or self.form_path(), "multipart/form-data; boundary=b", form_body(fields, files))

    def form_path(self) -> str:
        return self.rng.choice(["/v1/images/edits", "/v1/images/variations"])

    def json_of_wrong_types(self) -> bytes:
        body = json.dumps(self.fields(), ensure_ascii=self.rng.random() < 0.5).encode("utf-8", "surrogatepass")
        return self.post("/v1/images/generations", "application/json", body)

    def json_damaged(self) -> bytes:
        whole = bytearray(json.dumps({"prompt": "a red apple", "n": 1}).encode())
        for _ in range(self.rng.randrange(1, 6)):
            whole[self.rng.randrange(len(whole))] = self.rng.randrange(256)
        cut = whole[: self.rng.randrange(len(whole))]
        kind = self.rng.choice(["application/json", "text/plain", "application/x-www-form-urlencoded", "a/b", ""])
        return self.post("/v1/images/generations", kind, bytes(self.rng.choice([whole, cut])))

    def json_deep(self) -> bytes:
        depth = self.rng.choice([100, 10_000, 200_000])
        body = b'{"prompt": ' + self.rng.choice([b"[", b'{"a":']) * depth
        return self.post("/v1/images/generations", "application/json", body)

    def form_of_wrong_types(self) -> bytes:
        files = {"image": self.image, "mask": self.mask}
        if self.rng.random() < 0.3:
            files = {self.rng.choice(["image", "mask", "image[]", "markup", "../x", ""]): self.image}
        return self.form({k: v for k, v in self.fields().items()}, files)

    def form_cut_short(self) -> bytes:
        body = form_body({"prompt": "a"}, {"image": self.image, "mask": self.mask})
        cut = body[: self.rng.randrange(len(body))]
        length = len(cut) if self.rng.random() < 0.5 else len(body)
        return self.post(self.form_path(), "multipart/form-data; boundary=b", cut, length=length)

    def form_damaged(self) -> bytes:
        body = bytearray(form_body({"prompt": "a"}, {"image": self.image}))
        for _ in range(self.rng.randrange(1, 20)):
            body[self.rng.randrange(len(body))] = self.rng.randrange(256)
        boundary = self.rng.choice(["; boundary=b", "", "; boundary=", "; boundary=" + "b" * 5000, '; boundary="b'])
        return self.post(self.form_path(), "multipart/form-data" + boundary, bytes(body))

    def pictures_damaged(self) -> bytes:
        rng, form = self.rng, io.BytesIO()
        kind = rng.choice(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "ICO"])
        Image.open(io.BytesIO(self.image)).save(form, kind)
        data = bytearray(form.getvalue())
        for _ in range(rng.randrange(0, 10)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        return self.form({"prompt": "a red apple"}, {"image": bytes(data), "mask": self.mask})

    def pictures_bombs(self) -> bytes:
        choices = [self.bomb, self.large, self.text_bomb, gzip.compress(b"\0" * 10_000_000), b"PK\3\4" + b"\0" * 99]
        choices += [b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", b"%!PS\n"]
        bomb = self.rng.choice(choices)
        files = self.rng.choice([{"image": bomb, "mask": self.mask}, {"image": self.image, "mask": bomb}])
        return self.form({"prompt": "a"}, files, "/v1/images/edits")

    def masks(self) -> bytes:
        r, rng = self.resolution, self.rng
        pixels = np.full((r, rng.choice([r, r, 1, 3 * r]), 4), 255, np.uint8)
        for _ in range(rng.randrange(4)):
            y, x = rng.randrange(r), rng.randrange(pixels.shape[1])
            pixels[y : y + rng.randrange(1, r), x : x + rng.randrange(1, r), 3] = rng.choice([0, 0, 1])
        image = png(np.zeros((*pixels.shape[:2], 3), np.uint8)) if rng.random() < 0.5 else self.image
        return self.form({"prompt": "a red apple"}, {"image": image, "mask": png(pixels)}, "/v1/images/edits")

    def packed(self) -> bytes:
        body = gzip.compress(json.dumps({"prompt": "a" * 10_000_000}).encode())
        coding = self.rng.choice(["gzip", "deflate", "br", "identity, gzip", "\xff"])
        return self.post("/v1/images/generations", "application/json", body, f"content-encoding: {coding}")

    def paths(self) -> bytes:
        rng = self.rng
        name = rng.choice([*PATHS, "a.png", "%00", "..%5c", "x" * 5000, "🍎", "%ff%fe"])
        path = rng.choice(["/v1/images/files/", "/v1/models/", "/", "/studio/static/", "/v1/images/"]) + name
        method = rng.choice(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "FOO"])
        return f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode()

    def http_damaged(self) -> bytes:
        rng = self.rng
        return rng.choice([
            rng.randbytes(rng.randrange(300)),
            b"GET / HTTP/1.1\r\nhost: " + rng.randbytes(20) + b"\r\n\r\n",
            b"GET /health HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n",
            b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n",
            b"POST /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\nFFFFFFFFFF\r\n",
            b"POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: -5\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\norigin: null\r\nconnection: close\r\n\r\n",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        ])  # fmt: skip

    def length_wrong(self) -> bytes:
        length = self.rng.choice([0, 5, 10**9, 10**30])
        return self.post("/v1/images/generations", "application/json", b'{"prompt": "a red apple"}', length=length)


def form_body(fields: dict[str, Any], files: dict[str, bytes]) -> bytes:
    """A form; values that no form can hold are written as JSON."""

    def plain(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return text.encode("utf-8", "replace").decode()

    return multipart({plain(name).replace('"', ""): plain(value) for name, value in fields.items()}, files)


def declared_png(width: int, height: int, data: bytes) -> bytes:
    """A PNG that says it is so large, RGB, with these compressed rows."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def text_bomb(image: bytes) -> bytes:
    """A small picture with 200 MB of compressed text in it."""
    text = chunk(b"zTXt", b"bomb\0\0" + zlib.compress(b"\0" * 200_000_000, 9))
    return image[:33] + text + image[33:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


async def status_of(client: Client, message: bytes, half_closed: bool, seconds: list[float]) -> int:
    """The status of the answer, 0 where the connection was closed without one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    began = time.perf_counter()
    try:
        with contextlib.suppress(OSError):
            writer.write(message)
            await writer.drain()
            if half_closed:
                writer.write_eof()
            head = await reader.read(1 << 16)
            while await reader.read(1 << 16):
                pass
            with contextlib.suppress(ValueError, IndexError):
                return int(head.split()[1])
        return 0
    finally:
        seconds.append(time.perf_counter() - began)
        writer.transport.abort()


def files_in(*folders: Path) -> set[str]:
    return {str(path) for folder in folders for path in folder.rglob("*") if path.is_file()}


async def fuzz(port: int, args: argparse.Namespace) -> dict[str, Any]:
    source, client = Fuzz(args.seed, args.resolution), Client(port)
    messages = iter(range(args.requests))
    statuses: Counter[str] = Counter()
    failures: list[str] = []
    seconds: list[float] = []

    async def worker() -> None:
        while next(messages, None) is not None:
            name, message = source.next()
            try:
                status = await asyncio.wait_for(status_of(client, message, name in HALF_CLOSED, seconds), TIMEOUT)
            except TimeoutError:
                failures.append(f"{name}: no answer in {TIMEOUT:g} s: {message[:300]!r}")
                continue
            except OSError as error:
                failures.append(f"{name}: {error}: {message[:300]!r}")
                continue
            statuses[str(status)] += 1
            if status >= 500:
                failures.append(f"{name}: {status}: {message[:300]!r}")

    await asyncio.gather(*(worker() for _ in range(args.clients)))
    return {
        "requests": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "slowest_seconds": round(max(seconds), 2),
        "failures": len(failures),
        "first_failures": failures[:10],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--resolution", type=int, default=64, help="of the model (default: 64)")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = None if args.model is None else os.path.abspath(args.model)
    with tempfile.TemporaryDirectory() as name:
        home, data, temporary = (Path(name) / part for part in ("home", "data", "tmp"))
        for folder in (home, data, temporary):
            folder.mkdir()
        places = {"TMPDIR": str(temporary), "HOME": str(home)}
        with running(model, "--data", str(data), cwd=home, **places) as (server, port):
            before, start = files_in(home, temporary), memory(server)
            found = asyncio.run(fuzz(port, args))
            found["new_files"] = sorted(files_in(home, temporary) - before)
            found["memory_mib"] = {"before": round(start, 1), "after": round(memory(server), 1)}
            found["alive"] = server.poll() is None
    print(json.dumps(found, indent=1))
    if found["failures"] or found["new_files"] or not found["alive"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
