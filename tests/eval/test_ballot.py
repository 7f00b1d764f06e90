"""The ballot: who is asked what, that nobody can tell whose picture it is, and how votes are counted."""

import io
import json
import random
import shutil
import threading
import time
import urllib.error
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image

from armchair.cli import main
from armchair.errors import RequestError
from armchair.eval.ballot import QUESTIONS, Ballot, results_plot
from armchair.eval.ballot_page import COOKIE, PAGE, ballot_app
from armchair.sample.pipeline import load_artist
from conftest import write_tiny_bundle

PAIRS = 14
RED, BLUE = (220, 30, 30), (30, 30, 220)


def stripes(colour: tuple[int, int, int], seed: int) -> Image.Image:
    pixels = np.full((8, 8, 3), colour, np.uint8)
    pixels[seed % 8] = 255  # its own pixels in disorder look different
    return Image.fromarray(pixels)


@pytest.fixture
def ballot(tmp_path: Path) -> Ballot:
    """Red against blue."""
    captions = [f"picture {i}" for i in range(PAIRS)]
    first, second = ([stripes(c, i) for i in range(PAIRS)] for c in (RED, BLUE))
    return Ballot.create(tmp_path / "ballot.sqlite", ("red", "blue"), captions, first, second)


def shown(ballot: Ballot, pair: int, side: str, voter: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(ballot.picture(pair, side, voter))))


def is_red(pixels: np.ndarray) -> bool:
    return np.median(pixels[..., 0]) > np.median(pixels[..., 2])


def is_check(ballot: Ballot, pair: int, voter: str) -> bool:
    return is_red(shown(ballot, pair, "left", voter)) == is_red(shown(ballot, pair, "right", voter))


def ordered(pixels: np.ndarray) -> bool:
    """Whether white is in one row."""
    return int((pixels == 255).all(-1).sum(1).max()) == 8


def vote_all(ballot: Ballot, voter: str, red: float, careful: bool = True, rng: random.Random | None = None) -> int:
    """Judge everything; prefers red with the probability `red`."""
    rng, count = rng or random.Random(voter), 0
    while (ask := ballot.next(voter)) is not None:
        left = shown(ballot, ask.pair, "left", voter)
        for question in QUESTIONS:
            if is_check(ballot, ask.pair, voter):
                right = ordered(left) if careful else not ordered(left)
                ballot.vote(ask.pair, voter, question, "left" if right else "right")
            else:
                wants_red = rng.random() < red
                ballot.vote(ask.pair, voter, question, "left" if is_red(left) == wants_red else "right")
        count += 1
        assert count <= 2 * PAIRS
    return count


def test_each_pair_gets_five_votes_and_then_no_more(ballot: Ballot) -> None:
    for n in range(5):
        assert vote_all(ballot, f"voter{n}", red=1) == PAIRS + 2  # two checks
    assert vote_all(ballot, "voter5", red=1) == 2  # the checks only
    results = ballot.results()
    assert results["pairs"] == PAIRS and results["voters"] == 6 and results["voters_left_out"] == 0
    for found in results["questions"].values():
        assert (found["first"], found["second"], found["tie"]) == (PAIRS, 0, 0)
        assert found["votes"] == 5 * PAIRS and found["unanimous"] == PAIRS
        assert found["first_share"]["value"] == 1 and found["alpha"] is None  # one answer only


def test_pairs_with_few_votes_come_first(ballot: Ballot) -> None:
    vote_all(ballot, "early", red=1)
    seen = []
    for n in range(4):
        ask = ballot.next(f"late{n}")
        while is_check(ballot, ask.pair, f"late{n}"):
            for question in QUESTIONS:
                ballot.vote(ask.pair, f"late{n}", question, "tie")
            ask = ballot.next(f"late{n}")
        for question in QUESTIONS:
            ballot.vote(ask.pair, f"late{n}", question, "tie")
        seen.append(ask.pair)
    assert len(set(seen)) == 4


def test_sides_change_with_pair_and_voter_and_stay_for_one_voter(ballot: Ballot) -> None:
    sides = [
        is_red(shown(ballot, pair, "left", f"voter{n}"))
        for n in range(10)
        for pair in range(1, 15)
        if not is_check(ballot, pair, "x")
    ]
    assert 0.3 < np.mean(sides) < 0.7
    for pair in (1, 2, 3):
        one, two = (ballot.picture(pair, "left", "same") for _ in range(2))
        assert one == two and one != ballot.picture(pair, "right", "same")


def test_whoever_misses_checks_is_not_counted(ballot: Ballot) -> None:
    for n in range(5):
        vote_all(ballot, f"voter{n}", red=1)
    before = ballot.results()["questions"]
    vote_all(ballot, "careless", red=0, careful=False)
    after = ballot.results()
    assert after["voters_left_out"] == 1 and after["questions"] == before


def test_majorities_draws_and_changed_minds(ballot: Ballot) -> None:
    pair = next(p for p in range(1, 15) if not is_check(ballot, p, "x"))

    def say(voter: str, wants: str) -> None:
        left_is_red = is_red(shown(ballot, pair, "left", voter))
        choice = "tie" if wants == "tie" else "left" if (wants == "red") == left_is_red else "right"
        ballot.vote(pair, voter, "caption", choice)

    for voter, wants in zip("abcde", ("red", "red", "blue", "blue", "tie"), strict=True):
        say(voter, wants)
    found = ballot.results()["questions"]["caption"]
    assert (found["pairs"], found["tie"], found["first"]) == (1, 1, 0) and found["first_share"] is None
    say("e", "red")  # thought better of it
    found = ballot.results()["questions"]["caption"]
    assert (found["pairs"], found["tie"], found["first"], found["votes"]) == (1, 0, 1, 5)
    assert ballot.results()["questions"]["realistic"]["pairs"] == 0


def test_agreement_is_krippendorffs(ballot: Ballot) -> None:
    """Against the definition: 1 - observed over expected disagreement of pairs of votes."""
    rng = random.Random(1)
    for n in range(5):
        vote_all(ballot, f"voter{n}", red=0.7, rng=rng)
    with ballot._store() as store:
        rows = store.execute(
            "SELECT pair, choice FROM votes JOIN pairs ON pair = id WHERE question = 'caption' AND NOT is_check"
        ).fetchall()
    by_pair: dict[int, list[str]] = {}
    for pair, choice in rows:
        by_pair.setdefault(pair, []).append(choice)
    everything = [c for votes in by_pair.values() for c in votes]
    observed = sum(
        sum(a != b for i, a in enumerate(v) for j, b in enumerate(v) if i != j) / (len(v) - 1) for v in by_pair.values()
    ) / len(everything)
    n = len(everything)
    expected = sum(a != b for i, a in enumerate(everything) for j, b in enumerate(everything) if i != j) / (n * (n - 1))
    assert ballot.results()["questions"]["caption"]["alpha"] == pytest.approx(1 - observed / expected, abs=1e-9)
    found = ballot.results()["questions"]["caption"]
    low, high = found["first_share"]["interval"]
    assert low <= found["first_share"]["value"] <= high
    assert results_plot(ballot.results()).png[:4] == b"\x89PNG"


def test_several_vote_at_once_and_nothing_is_lost(ballot: Ballot) -> None:
    threads = [threading.Thread(target=vote_all, args=(Ballot(ballot.path), f"voter{n}", 1.0)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = Ballot(ballot.path).results()
    assert results["questions"]["caption"]["first"] == PAIRS and results["voters"] == 5


def test_wrong_votes_and_files_are_refused(ballot: Ballot, tmp_path: Path) -> None:
    for wrong in ((1, "v", "beauty", "left"), (1, "v", "caption", "up"), (99, "v", "caption", "left")):
        with pytest.raises(RequestError):
            ballot.vote(*wrong)
    with pytest.raises(RequestError, match="does not say which pictures it has: choose another --report"):
        ballot.check_made_of({"seed": "0"})
    with pytest.raises(RequestError, match="no pair"):
        ballot.picture(99, "left", "v")
    with pytest.raises(RequestError, match="people's votes"):
        Ballot.create(ballot.path, ("a", "b"), ["x"], [stripes(RED, 0)], [stripes(BLUE, 0)])
    (tmp_path / "other").write_text("not a database, but long enough to be looked at" * 30)
    with pytest.raises(RequestError, match="not a ballot"):
        Ballot(tmp_path / "other")


@pytest.fixture
def address(ballot: Ballot):
    server = uvicorn.Server(uvicorn.Config(ballot_app(ballot), port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


def test_a_vote_through_the_page(address: str, ballot: Ballot) -> None:
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    assert browser.open(address).read().decode() == PAGE
    ask = json.load(browser.open(f"{address}ballot/next"))
    assert ask["done"] == 0 and [name for name, _ in ask["questions"]] == list(QUESTIONS)
    assert "red" not in json.dumps(ask) and "blue" not in json.dumps(ask)
    sides = [browser.open(f"{address}ballot/picture/{ask['pair']}/{side}").read() for side in ("left", "right")]
    assert sides[0] != sides[1] and all(s[:4] == b"\x89PNG" for s in sides)
    for question in QUESTIONS:
        body = json.dumps({"pair": ask["pair"], "question": question, "choice": "left"}).encode()
        request = urllib.request.Request(f"{address}ballot/vote", body, {"content-type": "application/json"})
        assert json.load(browser.open(request)) == {"counted": True}
    assert json.load(browser.open(f"{address}ballot/next"))["done"] == 1
    with pytest.raises(urllib.error.HTTPError, match="403"):  # somebody who never opened the page
        urllib.request.urlopen(f"{address}ballot/next")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        browser.open(f"{address}ballot/picture/999/left")
    assert "http://" not in PAGE and "https://" not in PAGE


def test_the_command_draws_once_and_serves(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: None)
    argv = ["evaluate", str(tiny_bundle), "--human", str(tiny_bundle), "--data", "shapes:val,length=9"]
    argv += ["--report", str(tmp_path / "r"), "--pictures", "6", "--json"]
    assert main(argv) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["pairs"] == 6 and results["voters"] == 0 and results["made_of"]["second's guidance"] == "1.5"
    store = (tmp_path / "r/ballot.sqlite").read_bytes()
    assert main(argv) == 0 and (tmp_path / "r/ballot.sqlite").read_bytes() == store
    assert json.loads((tmp_path / "r/ballot.json").read_text())["questions"]["caption"]["first_share"] is None


def test_a_ballot_goes_on_only_where_it_is_the_same(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Votes on some pictures must not be counted for others."""
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: None)
    other = write_tiny_bundle(tmp_path / "other", seed=1)
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")

    def run(first: Path, second: Path, *flags: str, data: str = "shapes:val,length=9") -> tuple[int, str]:
        argv = ["evaluate", str(first), "--human", str(second), "--data", data, "--report", str(tmp_path / "r")]
        code = main([*argv, "--pictures", "6", "--weights", "fp32", "--device", "cpu", *flags])
        return code, capsys.readouterr().err

    assert run(tiny_bundle, tiny_bundle)[0] == 0
    store = tmp_path / "r/ballot.sqlite"
    before = store.read_bytes()
    for args, flags, named in (
        ((tiny_bundle, other), (), "second: tiny "),
        ((other, tiny_bundle), (), "first: tiny "),
        ((tiny_bundle, tiny_bundle), ("--seed", "1"), "seed: 0 there, 1 now"),
        ((tiny_bundle, tiny_bundle), ("--pictures", "5"), "captions: 6 of "),
        ((tiny_bundle, tiny_bundle), ("--temperature", "0.5"), "first's temperature: 1.0 there, 0.5 now"),
        ((tiny_bundle, tiny_bundle), ("--weights", "bf16"), "first's weights: fp32 there, bf16 now"),
    ):
        code, err = run(*args, *flags)
        assert code == 2 and err.count("\n") == 1, err
        assert named in err and err.endswith("choose another --report\n"), err
        told = err.partition("(")[2]
        assert told.startswith(named) and (";" in told) == ("first's" in named), told  # and nothing that is the same
    code, err = run(tiny_bundle, tiny_bundle, data="shapes:val,length=9,seed=5")
    assert code == 2 and "captions: 6 of " in err
    assert store.read_bytes() == before
    assert run(copy, tiny_bundle)[0] == 0  # the same model at another place


APPLE, MOON, TREE = "A red  apple", "the moon", "a tree"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Pictures of another system, with a table: reds, of other sizes, one of them broken."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    rows = []
    for name, text, size in (
        ("a-red-apple.png", "a red apple", (48, 40)),
        ("again.png", "a red apple", (40, 40)),
        ("moon.png", "The Moon", (700, 600)),
        ("broken.png", "a house", (8, 8)),
        ("boat.png", "a boat", (40, 40)),
    ):
        Image.new("RGB", size, RED).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": text}))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Pictures with text files: blues, larger, one with two captions."""
    folder = tmp_path / "ours"
    folder.mkdir()
    for name, captions, side in (("1", [TREE, APPLE], 64), ("2", [MOON], 600), ("3", ["a house"], 64)):
        Image.new("RGB", (side, side), BLUE).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("\n".join(captions))
    return folder


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command without its page: exit code, what it said, and captions with both pictures."""
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: None)

    def run(first: Path, second: Path, *flags: str, report: str = "r"):
        argv = ["evaluate", str(first), "--human", str(second), "--report", str(tmp_path / report), *flags]
        code, (_, err) = main(argv), capsys.readouterr()
        pairs = {}
        if (tmp_path / report / "ballot.sqlite").is_file():
            with Ballot(tmp_path / report / "ballot.sqlite")._store() as store:
                for caption, *sides in store.execute("SELECT caption, a, b FROM pairs WHERE NOT is_check"):
                    pairs[caption] = [np.asarray(Image.open(io.BytesIO(side))) for side in sides]
        return code, err, pairs

    return run


def test_two_folders_meet_in_their_captions(ours: Path, theirs: Path, held) -> None:
    code, err, pairs = held(ours, theirs)
    assert code == 0 and "3 captions are on both sides, of which 2 are asked about; passed over: 1 " in err
    assert pairs.keys() == {APPLE, MOON}
    for blue, red in pairs.values():
        assert not is_red(blue) and is_red(red) and blue.shape == red.shape
    assert pairs[APPLE][0].shape == (40, 40, 3) and pairs[MOON][0].shape == (512, 512, 3)
    assert held(ours, theirs)[0] == 0  # goes on
    Image.new("RGB", (9, 9), RED).save(theirs / "new.png")
    code, err, _ = held(ours, theirs)
    assert code == 2 and "second: theirs" in err and "choose another --report" in err


def test_a_bundle_draws_what_a_folder_has(tiny_bundle: Path, theirs: Path, tmp_path: Path, held) -> None:
    code, err, pairs = held(theirs, tiny_bundle, "--seed", "3")
    assert code == 0 and pairs.keys() == {"a red apple", "The Moon", "a boat"}, err
    captions = list(pairs)
    drawn = load_artist(str(tiny_bundle)).draw_each(captions, seed=3)
    for caption, image in zip(captions, drawn, strict=True):
        assert is_red(pairs[caption][0]) and pairs[caption][0].shape == (16, 16, 3)
        assert (pairs[caption][1] == np.asarray(image)).all()
    (tmp_path / "some").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "some/x.png")
    (tmp_path / "some/x.txt").write_text("a boat\na car")
    code, _, pairs = held(tiny_bundle, theirs, "--data", str(tmp_path / "some"), report="some")
    assert code == 0 and pairs.keys() == {"a boat"} and is_red(pairs["a boat"][1])
    assert len(held(tiny_bundle, theirs, "--pictures", "2", report="two")[2]) == 2


def test_folders_that_do_not_meet(tiny_bundle: Path, ours: Path, theirs: Path, tmp_path: Path, held) -> None:
    (ours / "1.txt").write_text("a tree")
    (ours / "2.txt").write_text("the sun")
    (ours / "3.txt").write_text("a dog")
    code, err, _ = held(ours, theirs)
    assert code == 2 and err.count("\n") == 1
    assert "no caption has a picture on both sides: ours has 3, such as 'a tree', theirs has 4, such as" in err
    code, err, _ = held(tiny_bundle, tiny_bundle)
    assert code == 2 and "--data names captioned images" in err
    (tmp_path / "empty").mkdir()
    code, err, _ = held(tiny_bundle, tmp_path / "empty")
    assert code == 2 and err.count("\n") == 1 and "no bundle.json, and is no folder of pictures: " in err


def votes_of(ballot: Ballot) -> list[tuple[int, str, str]]:
    with ballot._store() as store:
        return store.execute("SELECT pair, question, choice FROM votes ORDER BY at").fetchall()


def test_voting_with_keys(ballot: Ballot, address: str, browser) -> None:
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": 900, "height": 800})
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(address) else wrong.append(request.url))
    page.goto(address)
    progress, question = page.locator("#progress"), page.locator("#question")
    expect: list[tuple[int, str, str]] = []

    def pair() -> int:
        return int(page.locator("#left").get_attribute("src").split("/")[2])

    def press(*keys: str, choice: str) -> None:
        """One vote, and the next question is there."""
        at, asked = pair(), next(name for name, text in QUESTIONS.items() if text == question.inner_text())
        (voter,) = (cookie["value"] for cookie in context.cookies() if cookie["name"] == COOKIE)
        own = choice if choice == "tie" else "first" if (choice == "left") == left_is_first(at, voter) else "second"
        expect.append((at, asked, own))
        before = (question.inner_text(), progress.inner_text())
        for key in keys:
            page.keyboard.press(key)
        page.wait_for_function(
            "([question, progress]) => document.getElementById('question').textContent !== question"
            " || document.getElementById('progress').textContent !== progress",
            arg=before,
        )

    def left_is_first(at: int, voter: str) -> bool:
        left = shown(ballot, at, "left", voter)
        return ordered(left) if is_check(ballot, at, voter) else is_red(left)

    page.wait_for_selector("#progress:has-text('0 judged, 16 to go')")
    page.wait_for_function("() => [...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert "picture" in page.locator("#caption").inner_text()
    press("ArrowLeft", choice="left")
    press("ArrowRight", choice="right")
    assert "1 judged, 15 to go" in progress.inner_text()
    press("Space", choice="tie")
    press("3", choice="right")
    press("Tab", "Tab", "Tab", "Space", choice="right")  # the button that has the focus, and not what space says else
    press("ArrowLeft", choice="left")
    press("Space", choice="tie")  # no button has the focus now
    page.focus("button[data-choice=left]")
    press("Enter", choice="left")
    page.click("button[data-choice=left]")
    page.wait_for_function("text => document.getElementById('question').textContent === text", arg=QUESTIONS["caption"])
    expect.append((pair(), "realistic", votes_of(ballot)[-1][2]))
    press("Space", choice="tie")  # nor after a click
    assert votes_of(ballot) == expect
    page.keyboard.press("Control+ArrowLeft")
    for _ in range(5):
        page.keyboard.down("ArrowLeft")  # held: one vote
    page.wait_for_function("text => document.getElementById('question').textContent === text", arg=QUESTIONS["caption"])
    page.keyboard.up("ArrowLeft")
    assert len(votes_of(ballot)) == len(expect) + 1
    expect.append(votes_of(ballot)[-1])
    while len(expect) < 2 * 16 - 1:
        press("ArrowRight", choice="right")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#caption:has-text('Thank you')")
    assert page.locator("#pair").is_hidden() and len(votes_of(ballot)) == 2 * 16
    context.close()
    assert not wrong
