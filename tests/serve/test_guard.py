"""Who is let in and with what: keys, hosts, origins, sizes, bombs; and what the server says of itself."""

import gzip
import io
import json
import socket
import stat
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from armchair.errors import RequestError
from armchair.serve.app import Config
from armchair.serve.guard import is_loopback
from armchair.serve.images import MAX_PIXELS, Store, read_picture, rectangle_of
from armchair.serve.keys import Keys, add_key
from armchair.serve.models import Models
from armchair.serve.service import Service
from conftest import write_tiny_bundle
from test_benchmarks import benchmark

PATH = "/v1/images/generations"


@pytest.fixture
def http(address: str) -> Any:
    with httpx2.Client(base_url=address, timeout=30) as client:
        yield client


def error_of(answer: httpx2.Response, status: int, code: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and (code is None or error["code"] == code)
    return str(error["message"])


def raw(address: str, message: bytes, half_close: bool = False) -> bytes:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as link:
        link.sendall(message)
        if half_close:
            link.shutdown(socket.SHUT_WR)
        parts = []
        while part := link.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


# Keys.


def test_keys_are_hashed_in_the_file_and_known_again(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    anna, ben = add_key(path, "anna"), add_key(path, "ben")
    assert anna not in path.read_text() and stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = Keys.read(path)
    assert (keys.owner(anna), keys.owner(ben), keys.owner(anna + "x"), keys.owner("")) == ("anna", "ben", None, None)
    with pytest.raises(RequestError, match="already|has a key"):
        add_key(path, "anna")
    path.write_text("sk-this-is-a-key\n")
    with pytest.raises(RequestError, match="line 1.*NAME:SHA256") as refused:
        Keys.read(path)
    assert "sk-this" not in str(refused.value)
    path.write_text("# none\n")
    with pytest.raises(RequestError, match="no API key"):
        Keys.read(path)


def test_a_host_that_others_reach_needs_keys() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(RequestError, match="--api-key-file"):
            Config(host=host)
        assert not is_loopback(host)
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.8.8.8")))


def test_without_its_key_nothing_is_drawn(tiny_bundle: Path, tmp_path: Path, serve: Any) -> None:
    key = add_key(tmp_path / "keys.txt", "anna")
    keys = Keys.read(tmp_path / "keys.txt")
    with serve(Service(Models([str(tiny_bundle)], device="cpu")), keys=keys) as (_, address):
        for wrong in ("wrong", key[:-1], key.upper()):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key=wrong, max_retries=0)
            with client, pytest.raises(openai.AuthenticationError) as refused:
                client.images.generate(prompt="a")
            assert refused.value.code == "invalid_api_key"
        for odd in ("", "Bearer", "Bearer \xff\xfe", "Basic " + key, key):
            head = f"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: {odd}\r\nconnection: close\r\n\r\n"
            assert raw(address, head.encode("latin-1")).startswith(b"HTTP/1.1 401")
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
            url = client.images.generate(prompt="a", response_format="url").data[0].url
        assert httpx2.get(url).status_code == 200
        for path, status in (("/health", 200), ("/metrics", 401), ("/openapi.json", 401), ("/v1/models", 401)):
            assert httpx2.get(address + path).status_code == status
        assert httpx2.get(f"{address}/v1/models").headers["www-authenticate"] == "Bearer"


# Browsers.


def test_a_rebound_name_is_refused(http: Any, address: str) -> None:
    port = address.rpartition(":")[2]
    for host in (f"evil.example:{port}", "evil.example", "127.0.0.1.evil.example", "", "[", "10.0.0.1"):
        assert http.get("/health", headers={"host": host}).status_code in (400, 403), host
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert http.get("/health", headers={"host": host}).status_code == 200
    twice = b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\nconnection: close\r\n\r\n"
    assert raw(address, twice).startswith(b"HTTP/1.1 400")


def test_pages_of_other_sites_may_not_ask(http: Any, address: str) -> None:
    body = {"prompt": "a"}
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        error_of(http.post(PATH, json=body, headers=headers), 403, "wrong_origin")
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = http.options(PATH, headers=preflight)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    for headers in ({"origin": address}, {"sec-fetch-site": "same-origin"}, {}):
        assert http.post(PATH, json=body, headers=headers).status_code == 200
    assert http.get("/health", headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link that was followed
    text = {"content-type": "text/plain"}  # what a form of any page can send
    error_of(http.post(PATH, content=json.dumps(body), headers=text), 400)


def test_an_origin_that_is_let_in_can_read(tiny_bundle: Path, serve: Any) -> None:
    service = Service(Models([str(tiny_bundle)], device="cpu"))
    with serve(service, allow_origins=("https://good.example",), allow_hosts=("box.example",)) as (_, address):
        good = {"origin": "https://good.example", "host": "box.example"}
        asked = httpx2.options(address + PATH, headers={**good, "access-control-request-method": "POST"})
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "https://good.example"
        answer = httpx2.post(address + PATH, json={"prompt": "a"}, headers=good, timeout=30)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://good.example"
        assert httpx2.post(address + PATH, json={"prompt": "a"}, headers={"origin": "https://x.org"}).status_code == 403
    for origin in ("*", "good.example", "https://good.example/path"):
        with pytest.raises(RequestError, match="https://example.org"):
            Config(allow_origins=(origin,))


# Sizes.


def test_bodies_are_bounded_while_they_are_read(http: Any, address: str) -> None:
    error_of(http.post(PATH, content=b'{"prompt": "' + b"x" * 2_000_000), 413, "too_large")

    def pieces() -> Any:
        for _ in range(100):
            yield b" " * 50_000

    error_of(http.post(PATH, content=pieces(), headers={"content-type": "application/json"}), 413, "too_large")
    packed = gzip.compress(b'{"prompt": "a"}')
    answer = http.post(PATH, content=packed, headers={"content-encoding": "gzip", "content-type": "application/json"})
    error_of(answer, 415, "unsupported_encoding")
    big = b"POST /v1/images/edits HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=b\r\n"
    assert b" 413 " in raw(address, big + b"content-length: 99999999999999999\r\nconnection: close\r\n\r\n")[:20]


def test_damaged_bodies_are_wrong_requests(http: Any) -> None:
    json_type = {"content-type": "application/json"}
    deep = b'{"prompt": ' + b"[" * 300_000
    for body in (b"", b"{", b"[]", b"3", deep, b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}'):
        error_of(http.post(PATH, content=body, headers=json_type), 400)
    for value in ("1e999", "NaN", "-Infinity", "1" + "0" * 5000, '"x"', "[1]", "{}", "true"):
        body = f'{{"prompt": "a", "temperature": {value}, "n": {value}}}'.encode()
        error_of(http.post(PATH, content=body, headers=json_type), 400)
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x", "text/plain", "application/json"):
        error_of(http.post("/v1/images/edits", content=b"--b\r\n\r\n", headers={"content-type": kind}), 400)
    files = [("image", ("x", b"1")), ("image", ("y", b"2"))]
    assert "once" in error_of(http.post("/v1/images/edits", data={"prompt": "a"}, files=files), 400)
    many = {f"f{i}": "1" for i in range(100)}
    error_of(http.post("/v1/images/edits", data=many, files={"image": ("../../x", b"1")}), 400)


def test_a_body_that_stays_away_is_not_waited_for(tiny_bundle: Path, serve: Any, monkeypatch: Any) -> None:
    with serve(Service(Models([str(tiny_bundle)], device="cpu"))) as (server, address):
        guard = server.config.app
        guard.rules = type(guard.rules)(hosts=guard.rules.hosts, body_seconds=0.3)
        head = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        assert raw(address, head + b"content-length: 20\r\n\r\n{").startswith(b"HTTP/1.1 408")


def declared_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 10_000_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(10_000, 5_000), (50_000, 50_000), (4097, 4096), (2**31 - 1, 1)])
def test_decompression_bombs_are_refused_before_a_pixel_is_decoded(width: int, height: int) -> None:
    began = time.perf_counter()
    with pytest.raises(RequestError, match=f"image: expected at most {MAX_PIXELS} pixels|damaged"):
        read_picture(declared_png(width, height), "image")
    assert time.perf_counter() - began < 1


def test_only_pictures_are_pictures() -> None:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "TIFF")
    for data in (b"", b"<svg/>", b"%!PS", out.getvalue(), b"\x89PNG\r\n\x1a\n" + b"\0" * 50):
        with pytest.raises(RequestError, match="image: "):
            read_picture(data, "image")


def test_a_mask_is_read_at_any_size() -> None:
    pixels = np.full((32, 48, 4), 255, np.uint8)
    pixels[5:17, 12:32, 3] = 0  # the centre square begins at column 8
    assert rectangle_of(Image.fromarray(pixels), 16) == (2, 2, 12, 9)
    pixels[:, :, 3] = 0
    assert rectangle_of(Image.fromarray(pixels), 16) == (0, 0, 16, 16)


def test_files_are_kept_within_a_bound_and_for_a_while() -> None:
    store = Store(most=100, seconds=60)
    names = [store.add(b"x" * 40, "png") for _ in range(3)]
    assert len(set(names)) == 3 and all(len(name) > 30 for name in names)
    assert store.find(names[0]) is None and store.find(names[2]) is not None and store.size == 80
    store = Store(seconds=0)
    assert store.find(store.add(b"x", "png")) is None


# The server.


def test_what_the_server_says_of_itself(http: Any) -> None:
    http.post(PATH, json={"prompt": "a"})
    assert http.get("/health").json() == {"status": "ok"} and http.get("/ready").status_code == 200
    text = http.get("/metrics").text
    assert f'armchair_requests_total{{method="POST",route="{PATH}",status="200"}}' in text
    assert 'armchair_queue_waiting{model="first"} 0' in text and 'armchair_pictures_total{model="first"}' in text
    for line in text.splitlines():
        assert line.startswith("#") or len(line.rsplit(" ", 1)) == 2 and float(line.rsplit(" ", 1)[1]) >= 0
    http.get("/made/up/" + "x" * 50)
    assert "made/up" not in http.get("/metrics").text  # labels are bounded
    assert http.get("/nothing").json() == {"detail": "Not Found"}
    error_of(http.get("/v1/nothing"), 404)
    error_of(http.get(PATH), 405)
    ids = {http.get(path).headers["x-request-id"] for path in ("/health", "/v1/models", "/nothing", "/v1/nothing")}
    assert len(ids) == 4


def test_the_openapi_document_has_all_fields(http: Any) -> None:
    document = http.get("/openapi.json").json()
    fields = document["components"]["schemas"]["Generation"]["properties"]
    assert {"prompt", "n", "size", "seed", "candidates", "guidance", "stream", "partial_images"} <= set(fields)
    form = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["mask"] == {"type": "string", "format": "binary"}
    assert form["required"] == ["image", "prompt"]
    assert "422" not in json.dumps(document["paths"])


def test_a_full_queue_is_429_and_leaving_frees_it(tiny_bundle: Path, serve: Any) -> None:
    service = Service(Models([str(tiny_bundle)], device="cpu", queue=1))
    with serve(service) as (_, address), openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
        client.images.generate(prompt="a")
        drawer, go = service.models.drawer(), threading.Event()
        holding = drawer.call(lambda _: go.wait(30))
        message = json.dumps({"prompt": "a"}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        link = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
        link.sendall(f"{head}content-length: {len(message)}\r\n\r\n".encode() + message)
        while drawer.load()["waiting"] == 0:
            time.sleep(0.01)
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="queue is full") as refused:
                client.images.generate(prompt="a", stream=stream)
            assert int(refused.value.response.headers["retry-after"]) >= 1
            assert refused.value.code == "rate_limit_exceeded"
        link.close()
        while drawer.load()["waiting"]:
            time.sleep(0.01)
        go.set()
        holding.result(30)
        client.images.generate(prompt="a")


def test_a_client_that_leaves_a_stream_frees_its_place(tiny_bundle: Path, serve: Any) -> None:
    service = Service(Models([str(tiny_bundle)], device="cpu"))
    with serve(service) as (_, address), openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
        own = {"candidates": 500}
        stream = client.images.generate(prompt="a", stream=True, partial_images=3, extra_body=own)
        next(iter(stream))
        stream.close()
        ends = time.monotonic() + 2
        while service.models.drawer().load()["pictures"]:
            assert time.monotonic() < ends
            time.sleep(0.01)


def test_stopping_finishes_what_is_there(tiny_bundle: Path, serve: Any) -> None:
    service = Service(Models([str(tiny_bundle)], device="cpu"))
    answers: list[Any] = []
    with serve(service, grace=60.0) as (server, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)

        def ask() -> None:
            answers.append(client.images.generate(prompt="a", extra_body={"candidates": 60}))

        thread = threading.Thread(target=ask)
        thread.start()
        while not service.models.opened() or not service.models.drawer().load()["drawing"]:
            time.sleep(0.01)
        server.should_exit = True
        thread.join(60)
        client.close()
    assert len(answers) == 1 and answers[0].data[0].b64_json


def test_a_model_that_cannot_be_opened_is_not_ready(tmp_path: Path, serve: Any, caplog: Any) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle")
    service = Service(Models([str(bundle)], device="cpu"))
    weights = bundle / "prior.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with serve(service) as (_, address):
        ends = time.monotonic() + 10
        while "altered" not in httpx2.get(f"{address}/ready").text:
            assert time.monotonic() < ends
        assert httpx2.get(f"{address}/ready").status_code == 503 and httpx2.get(f"{address}/health").status_code == 200


def test_cases_out_of_the_openapi_document_meet_no_failure_of_the_server(address: str) -> None:
    pytest.importorskip("schemathesis")
    found = benchmark("serve_schema").check(int(address.rpartition(":")[2]), 60, seed=1)
    assert found["cases"] >= 60 and not found["failures"]


def test_requests_that_nobody_should_send_meet_no_failure_of_the_server(
    tiny_bundle: Path, capsys: Any, monkeypatch: Any
) -> None:
    flags = ["--model", str(tiny_bundle), "--resolution", "16", "--requests", "150", "--clients", "8"]
    monkeypatch.setattr("sys.argv", ["serve_fuzz", *flags])
    benchmark("serve_fuzz").main()  # it ends the test where something is wrong
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] == 150 and found["new_files"] == [] and found["statuses"]["400"] > 50
