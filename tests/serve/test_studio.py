"""The studio's routes, on a server of this machine."""

import base64
import http.client
import io
import json
import shlex
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from armchair.cli import main
from armchair.eval.ballot import Ballot
from armchair.sample.png import read_record
from armchair.serve.studio import MAX_DROPPED
from conftest import write_tiny_bundle
from serve.studio_app import studio

PROMPT = "a <b>red</b> circle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("ranked") / "tiny", ranked=True)


@pytest.fixture(scope="module")
def running(bundle, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    ballot = Ballot.create(data / "ballot.sqlite", ("a", "b"), ["one"], [image], [image])
    with studio(bundle, data, ballot) as (url, service):
        yield url, service


@pytest.fixture
def url(running):
    url, service = running
    service.busy, service.queue, service.slow = None, (), 0.0
    return url


@pytest.fixture
def service(running, url):
    return running[1]


def ask(url, path, data=None, headers=None, kind="application/json"):
    """Status, headers and body of an answer."""
    body = None if data is None else data if isinstance(data, bytes) else json.dumps(data).encode()
    told = {} if body is None else {"content-type": kind}
    request = urllib.request.Request(url + path, body, {**told, **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def told(url, path, data=None, **how):
    status, _, body = ask(url, path, data, **how)
    assert status == 200, body
    return json.loads(body)


def refused(url, path, data=None, **how):
    status, _, body = ask(url, path, data, **how)
    return status, json.loads(body)["detail"]


def events(url, **wish):
    status, headers, body = ask(url, "/studio/draw", wish)
    assert status == 200, body
    assert headers.get_content_type() == "text/event-stream"
    parts = [part.split("\n") for part in body.decode().strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


def drawn(url, **wish):
    name, last = events(url, **wish)[-1]
    assert name == "done", last
    return last["entry"]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def from_url(data_url: str) -> np.ndarray:
    return pixels(base64.b64decode(data_url.partition(",")[2]))


def picture(url, picture):
    return ask(url, f"/studio/pictures/{picture['id']}")[2]


def test_pictures_grow_row_by_row_and_end_best_first(url):
    found = events(url, prompt=PROMPT, candidates=3, seed="5")
    partials = [event for name, event in found if name == "partial"]
    assert [event["rows"] for event in partials] == sorted(event["rows"] for event in partials)
    assert len(partials) >= 3 and all(len(event["images"]) == 3 for event in partials)
    assert partials[0]["drawn"] == [pytest.approx(partials[0]["rows"] / 4)] * 3
    entry = found[-1][1]["entry"]
    scores = [one["score"] for one in entry["pictures"]]
    assert scores == sorted(scores, reverse=True) and entry["prompt"] == PROMPT
    last = max((event for event in partials if event["rows"] < 4), key=lambda event: event["rows"])
    for one in entry["pictures"]:
        partial = from_url(last["images"][one["candidate"]])[:4].astype(int)
        whole = pixels(picture(url, one))[:4]
        assert np.median(np.abs(partial - whole)) < 4  # the decoder looks a little below a row, so not the same bits


def test_a_table_has_a_picture_a_combination_that_differs_in_words_alone(url):
    found = events(url, prompt="a {red|blue} {circle|square}", candidates=1, seed="9")
    entry = found[-1][1]["entry"]
    assert entry["kind"] == "grid" and entry["choices"] == [["red", "blue"], ["circle", "square"]]
    wanted = ["a red circle", "a red square", "a blue circle", "a blue square"]
    assert [one["prompt"] for one in entry["pictures"]] == wanted
    assert {event["cell"] for name, event in found if name == "cell"} == {0, 1, 2, 3}
    assert {one["seed"] for one in entry["pictures"]} == {"9"}
    alone = drawn(url, prompt="a blue circle", candidates=1, seed="9")
    assert (pixels(picture(url, entry["pictures"][2])) == pixels(picture(url, alone["pictures"][0]))).all()
    status, said = refused(url, "/studio/draw", {"prompt": "{a|b|c|d|e|f|g} {a|b|c|d|e|f|g}"})
    assert status == 400 and "49 combinations" in said


def test_a_region_is_drawn_anew_and_the_rest_stays(url):
    before = drawn(url, prompt="a red circle", candidates=1, seed="1")["pictures"][0]
    found = events(url, prompt="a blue square", candidates=2, seed="2", picture=before["id"], rectangle=[4, 4, 12, 12])
    inside = np.zeros((16, 16), bool)
    inside[4:12, 4:12] = True
    old = pixels(picture(url, before))
    entry = found[-1][1]["entry"]
    assert entry["kind"] == "complete" and entry["parent"]
    for one in entry["pictures"]:
        new = pixels(picture(url, one))
        assert (new[~inside] == old[~inside]).all() and (new[inside] != old[inside]).any()
    for name, event in found:  # while it is drawn, too
        if name == "partial":
            assert (from_url(event["images"][0])[~inside] == old[~inside]).all()


def run_command(line: str, folder, monkeypatch) -> list[np.ndarray]:
    monkeypatch.chdir(folder)
    before = set(folder.glob("*.png"))
    program, *words = shlex.split(line)
    assert program == "armchair" and main(words) == 0
    return [pixels(path.read_bytes()) for path in sorted(set(folder.glob("*.png")) - before)]


@pytest.mark.parametrize(
    "wish",
    [
        {"prompt": "a red circle"},
        {"prompt": "it's --big \"$HOME\" `x` \\", "seed": "12345678901234567", "candidates": 2},
        {"prompt": "-n 3 blue", "guidance": 2.5, "top_k": 7, "temperature": 0.8, "top_p": 1, "min_p": 0.1},
        {"prompt": "a red circle", "naturalness": 0.5},
        {"prompt": "a {red|blue} square", "candidates": 3, "seed": "4"},
    ],
)
def test_the_command_of_a_picture_draws_it(url, tmp_path, monkeypatch, wish):
    entry = drawn(url, **wish)
    one = entry["pictures"][-1]
    made = run_command(one["command"], tmp_path, monkeypatch)
    place = 0 if entry["kind"] == "grid" else len(entry["pictures"]) - 1
    assert (made[place] == pixels(picture(url, one))).all()


def test_the_command_says_no_more_than_it_has_to(url, bundle):
    (one, *_) = drawn(url, prompt="a red circle")["pictures"]
    assert one["command"] == f"armchair draw 'a red circle' --model {shlex.quote(str(bundle))}"
    assert one["own"] == {}
    (one, *_) = drawn(url, prompt="circle", candidates=8, seed="3", guidance=2)["pictures"]
    assert one["command"].endswith("-n 8 --seed 3 --guidance 2.0") and one["own"] == {"guidance": 2}


def test_the_command_of_a_completion_draws_it_beside_what_it_was_drawn_from(url, tmp_path, monkeypatch):
    before = drawn(url, prompt="a red circle", candidates=1)["pictures"][0]
    entry = drawn(url, prompt="a blue square", candidates=2, seed="2", picture=before["id"], rectangle=[4, 0, 16, 8])
    (tmp_path / before["file"]).write_bytes(picture(url, before))
    made = run_command(entry["pictures"][0]["command"], tmp_path, monkeypatch)
    assert (made[0] == pixels(picture(url, entry["pictures"][0]))).all()


def test_saved_pictures_carry_their_record(url, bundle, tmp_path):
    one = drawn(url, prompt=PROMPT, candidates=1, seed="5")["pictures"][0]
    (tmp_path / "x.png").write_bytes(picture(url, one))
    record = read_record(tmp_path / "x.png")
    assert record["prompt"] == PROMPT and record["seed"] == 5
    assert main(["redraw", str(tmp_path / "x.png"), "--model", str(bundle), "--out", str(tmp_path / "y.png")]) == 0
    assert (tmp_path / "y.png").read_bytes() == (tmp_path / "x.png").read_bytes()


def test_a_dropped_png_brings_its_prompt_and_settings_back(url):
    one = drawn(url, prompt=PROMPT, candidates=2, seed="5", guidance=3)["pictures"][1]
    entry = told(url, "/studio/dropped", {"png": base64.b64encode(picture(url, one)).decode()})
    (back,) = entry["pictures"]
    same = ("prompt", "seed", "candidate", "settings", "own", "model", "score")
    assert {name: back[name] for name in same} == {name: one[name] for name in same}
    assert (pixels(picture(url, back)) == pixels(picture(url, one))).all()


def png(size=(8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        (png(), 400, "no armchair metadata"),
        (b"GIF89a nothing", 400, "not a PNG"),
        (png()[:30], 400, "cut short"),
        (b"x" * (MAX_DROPPED + 4096), 413, "expected at most"),
    ],
)
def test_what_is_dropped_and_is_no_picture_of_ours_gets_one_line(url, data, status, said):
    found, words = refused(url, "/studio/dropped", {"png": base64.b64encode(data).decode()})
    assert found == status and said in words and "\n" not in words


def test_history_is_searched_starred_deleted_and_restored(url):
    entry = drawn(url, prompt="a unicorn", candidates=2)
    assert [e["id"] for e in told(url, "/studio/history?search=unicorn")["entries"]] == [entry["id"]]
    star = entry["pictures"][1]["id"]
    told(url, f"/studio/pictures/{star}/favourite", {"favourite": True})
    (found,) = told(url, "/studio/history?favourites=true&search=unicorn")["entries"]
    assert [one["id"] for one in found["pictures"]] == [star]
    told(url, f"/studio/history/{entry['id']}/delete", {})
    assert told(url, "/studio/history?search=unicorn")["entries"] == []
    assert refused(url, f"/studio/pictures/{star}")[0] == 400
    told(url, f"/studio/history/{entry['id']}/restore", {})
    assert len(told(url, f"/studio/history/{entry['id']}")["pictures"]) == 2


def test_looking_inside_gives_codes_bits_and_words(url):
    one = drawn(url, prompt="red circle", candidates=1)["pictures"][0]
    look = told(url, "/studio/look", {"picture": one["id"]})
    assert look["words"] == ["red", "circle"] and len(look["codes"]) == len(look["bits"]) == 4
    assert len(look["attention"]) == 4 and len(look["attention"][0]) == 16
    assert all(abs(sum(row) - 1) < 1e-3 for layer in look["attention"] for row in layer)
    assert from_url(look["alone"]).shape == (16, 16, 3)


def test_where_a_request_stands_is_told_in_words(url, service):
    service.queue = (3, 1)
    found = [event for name, event in events(url, prompt="circle", candidates=1) if name == "queued"]
    assert [event["words"] for event in found[:2]] == ["2 before yours", "Yours is next"]


def test_no_room_is_told_with_when_to_ask_again(url, service):
    service.busy = 7.0
    status, headers, body = ask(url, "/studio/draw", {"prompt": "circle"})
    assert status == 429 and headers["retry-after"] == "7"
    assert json.loads(body)["detail"] == "16 requests are waiting already"


def test_who_goes_away_frees_the_place(url, service):
    service.slow, service.given_up = 0.2, 0
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    wish = json.dumps({"prompt": "a {red|blue} circle", "candidates": 1})
    connection.request("POST", "/studio/draw", wish, {"content-type": "application/json"})
    answer = connection.getresponse()
    answer.read(20)
    answer.close()
    connection.close()
    ends = time.monotonic() + 10
    while service.given_up < 2 and time.monotonic() < ends:
        time.sleep(0.05)
    assert service.given_up == 2


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "candidates": 17}, "candidates: expected 1 to 16"),
        ({"prompt": "x", "seed": "-1"}, "seed: expected"),
        ({"prompt": "x", "seed": str(2**63)}, "seed: expected"),
        ({"prompt": "x", "top_p": 2}, "top_p"),
        ({"prompt": "x", "colour": "red"}, "unknown field 'colour'"),
        ({"prompt": "x", "picture": 1}, "both the picture and the rectangle"),
        ({"prompt": "x", "picture": 99999, "rectangle": [0, 0, 4, 4]}, "no picture 99999"),
        (["x"], "expected a mapping"),
    ],
)
def test_wrong_wishes_are_refused_in_a_line(url, wish, said):
    status, words = refused(url, "/studio/draw", wish)
    assert status == 400 and said in words and "\n" not in words


def test_an_unknown_model_is_404(url):
    assert refused(url, "/studio/draw", {"prompt": "x", "model": "nobody"})[0] == 404


POSTS = ("choices", "draw", "history/1/delete", "history/1/restore", "pictures/1/favourite", "look", "dropped")


SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
FIELDS = st.sampled_from(["prompt", "seed", "candidates", "picture", "rectangle", "top_k", "png", "favourite", "model"])
JSON = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=4))


@given(st.sampled_from([name for name in POSTS if name != "draw"]), JSON)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_gets_an_answer(url, name, data):
    status, _, body = ask(url, f"/studio/{name}", data)
    assert status < 500 and json.loads(body)


@given(st.dictionaries(FIELDS, JSON, max_size=5))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_wished_for_gets_an_answer(url, wish):
    status, _, body = ask(url, "/studio/draw", {"prompt": "circle", **wish})
    assert status in (200, 400, 404)
    assert status != 200 or b"event: done" in body


@pytest.mark.parametrize("path", [f"/studio/{name}" for name in POSTS])
def test_other_sites_and_forms_change_nothing(url, path):
    for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x"):
        assert ask(url, path, b"{}", kind=kind)[0] == 415
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        assert ask(url, path, {}, headers=headers)[0] == 403
    assert ask(url, path, b"{not json")[0] == 400


def test_other_sites_read_nothing(url):
    for path in ("/studio/about", "/studio/history", "/studio/pictures/1"):
        status, headers, _ = ask(url, path, headers={"sec-fetch-site": "cross-site"})
        assert status == 403 and "access-control-allow-origin" not in headers


def test_the_page_allows_nothing_from_elsewhere(url):
    status, headers, body = ask(url, "/")
    policy = headers["content-security-policy"]
    assert status == 200 and "default-src 'none'" in policy and "script-src 'self'" in policy
    assert "unsafe" not in policy and "http" not in policy
    for name in ("studio.js", "studio.css", "dom.js", "server.js", "stage.js", "viewer.js", "look.js", "history.js"):
        status, headers, text = ask(url, f"/studio/static/{name}")
        assert status == 200 and headers.get_content_type() in ("text/javascript", "text/css")
        assert b"innerHTML" not in text and b"http:" not in text and b"https:" not in text and b"//cdn" not in text
    assert b"style=" not in body and b"onclick" not in body


@pytest.mark.parametrize("name", ["../studio.py", "..%2fstudio.py", "%2e%2e/history.py", "nothing.js", ""])
def test_only_the_page_s_own_files_are_served(url, name):
    assert ask(url, f"/studio/static/{name}")[0] == 404


@pytest.mark.parametrize("id", ["0", "-1", "x", "1%20OR%201", "99999999999999999999999"])
def test_numbers_that_are_none_are_refused(url, id):
    assert ask(url, f"/studio/pictures/{id}")[0] in (400, 422)
    assert ask(url, f"/studio/history/{id}")[0] in (400, 422)


def test_the_ballot_is_there(url):
    assert told(url, "/studio/about")["ballot"] is True
    assert b"Which picture?" in ask(url, "/ballot/")[2]


def test_a_model_without_a_ranker_keeps_the_order_of_drawing(tiny_bundle, tmp_path):
    with studio(tiny_bundle, tmp_path) as (url, _):
        entry = drawn(url, prompt="circle", candidates=3)
        assert [one["score"] for one in entry["pictures"]] == [None] * 3
        assert [one["candidate"] for one in entry["pictures"]] == [0, 1, 2]
        assert told(url, "/studio/about")["ballot"] is False
