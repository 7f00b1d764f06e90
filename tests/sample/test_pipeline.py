import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import armchair
from armchair.bundle import read_bundle, write_bundle
from armchair.config import to_dict
from armchair.errors import BundleError, RequestError, WorkError
from armchair.sample.engine import default_weights
from armchair.sample.generate import FREE
from armchair.sample.pipeline import Artist, Drawing, load_artist, redraw_png
from armchair.sample.png import read_record, save_png
from conftest import write_tiny_bundle

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def artist(tiny_bundle: Path) -> Artist:
    return load_artist(tiny_bundle, "cpu")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.effect_noise((40, 30), 90).convert("RGB")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def same(a: Drawing, b: Drawing, n: int) -> None:
    assert (a.codes[:n] == b.codes[:n]).all()
    for x, y in zip(a.images[:n], b.images[:n], strict=True):
        assert (pixels(x) == pixels(y)).all()


def test_a_drawing(artist: Artist) -> None:
    drawing = artist.draw(PROMPT, seed=7)
    assert drawing.codes.shape == (4, 4, 4) and drawing.codes.dtype == np.int64
    assert [i.size for i in drawing.images] == [(16, 16)] * 4
    assert drawing.scores == [None] * 4 and drawing.seeds == [7] * 4 and drawing.candidates == [0, 1, 2, 3]
    assert drawing.settings.guidance == 1.5 and drawing.settings.top_p == 0.95
    assert len({c.tobytes() for c in drawing.codes}) == 4
    assert len({pixels(i).tobytes() for i in drawing.images}) == 4


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_candidates_do_not_depend_on_their_number(artist: Artist, guidance: float) -> None:
    few = artist.draw(PROMPT, candidates=4, seed=3, guidance=guidance)
    for count in (1, 13, 16):
        many = artist.draw(PROMPT, candidates=count, seed=3, guidance=guidance)
        same(few, many, min(count, 4))
    same(few, artist.draw(PROMPT, candidates=16, keep=4, seed=3, guidance=guidance), 4)


def test_seeds_prompts_and_settings_matter(artist: Artist) -> None:
    first = artist.draw(PROMPT).codes
    assert (artist.draw(PROMPT).codes == first).all()
    assert (artist.draw(PROMPT, seed=1).codes != first).any()
    assert (artist.draw("a blue square").codes != first).any()
    assert (artist.draw(PROMPT, temperature=3.0).codes != first).any()
    greedy = artist.draw(PROMPT, temperature=0.0)
    assert (greedy.codes == greedy.codes[:1]).all()


def test_loading_and_drawing_leave_the_global_generator_alone(tiny_bundle: Path) -> None:
    before = torch.random.get_rng_state()
    load_artist(tiny_bundle, "cpu").draw(PROMPT, candidates=1)
    assert (torch.random.get_rng_state() == before).all()


def test_the_same_request_gives_the_same_file(artist: Artist, tmp_path: Path) -> None:
    (a,) = artist.draw(PROMPT, candidates=1, seed=5).save(tmp_path / "a.png")
    b = artist.draw(PROMPT, candidates=3, seed=5).save(tmp_path / "b.png")
    assert [p.name for p in b] == ["b-01.png", "b-02.png", "b-03.png"]
    assert a.read_bytes() == b[0].read_bytes() != b[1].read_bytes()


def test_save(artist: Artist, tmp_path: Path) -> None:
    drawing = artist.draw(PROMPT, candidates=2)
    paths = drawing.save(tmp_path, grid=True)
    assert [p.name for p in paths] == ["a-red-circle-01.png", "a-red-circle-02.png", "a-red-circle-grid.png"]
    record = read_record(paths[1])
    assert record["prompt"] == PROMPT and record["candidate"] == 1 and record["kind"] == "draw"
    assert record["bundle"] == {"name": "tiny", "fingerprint": artist.bundle.fingerprint}
    assert record["codes"] == drawing.codes[1].tolist()
    with pytest.raises(RequestError, match="there already"):
        drawing.save(tmp_path)
    drawing.save(tmp_path, force=True)
    with pytest.raises(RequestError, match="only single pictures"):
        redraw_png(paths[2], "cpu")


def test_to_json(artist: Artist, tmp_path: Path) -> None:
    drawing = artist.draw(PROMPT, candidates=2, seed=9)
    data = json.loads(json.dumps(drawing.to_json(drawing.save(tmp_path))))
    assert list(data) == ["prompt", "bundle", "settings", "images"]
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 0.95, "min_p": 0.0, "guidance": 1.5, "naturalness": 0.0}
    assert data["settings"] == {**sampling, "weights": default_weights()}
    assert [list(i) for i in data["images"]] == [["path", "candidate", "seed", "score", "codes"]] * 2
    assert data["images"][1]["path"].endswith("a-red-circle-02.png") and data["images"][1]["score"] is None
    assert drawing.to_json()["images"][0]["path"] is None


def test_redraw_bit_for_bit(artist: Artist, tmp_path: Path) -> None:
    paths = artist.draw(PROMPT, candidates=11, seed=2, temperature=0.9, top_k=9).save(tmp_path / "x.png")
    for path in (paths[0], paths[10]):
        again = redraw_png(path, "cpu")
        assert (pixels(again.images[0]) == pixels(Image.open(path))).all()
        (copy,) = again.save(tmp_path / f"again-{path.name}")
        assert copy.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("weights", ["fp32", "bf16", default_weights()])
def test_redraw_uses_the_recorded_weights(tiny_bundle: Path, tmp_path: Path, weights: str) -> None:
    (path,) = load_artist(tiny_bundle, "cpu", weights=weights).draw(PROMPT, candidates=1).save(tmp_path / "w.png")
    assert read_record(path)["weights"] == weights
    again = load_artist(tiny_bundle, "cpu").redraw(path)
    (copy,) = again.save(tmp_path / "again.png")
    assert again.weights == weights and copy.read_bytes() == path.read_bytes()


def test_redraw_of_a_picture_from_before_weights_had_forms(tiny_bundle: Path, tmp_path: Path) -> None:
    drawing = load_artist(tiny_bundle, "cpu", weights="fp32").draw(PROMPT, candidates=1)
    record = to_dict(drawing.record(0))
    del record["weights"]
    save_png(drawing.images[0], tmp_path / "old.png", record, force=False)
    assert (redraw_png(tmp_path / "old.png").codes == drawing.codes).all()


def test_unknown_weights_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(RequestError, match="weights.*'int8'"):
        load_artist(tiny_bundle, "cpu", weights="int9")


def test_redraw_of_a_completion(artist: Artist, photo: Image.Image, tmp_path: Path) -> None:
    drawing = artist.complete(photo, PROMPT, redraw=(3, 5, 11, 14), candidates=2, seed=4)
    path = drawing.save(tmp_path / "c.png")[1]
    assert read_record(path)["rectangle"] == [3, 5, 11, 14]
    again = redraw_png(path, "cpu")
    assert again.save(tmp_path / "d.png")[0].read_bytes() == path.read_bytes()
    with Image.open(path) as image:
        save_png(image.resize((8, 8)), path, read_record(path), force=True)
    with pytest.raises(RequestError, match="resized"):
        redraw_png(path, "cpu")


def test_redraw_needs_the_same_bundle(artist: Artist, tiny_bundle: Path, tmp_path: Path) -> None:
    (path,) = artist.draw(PROMPT, candidates=1).save(tmp_path / "x.png")
    other = write_tiny_bundle(tmp_path / "other", seed=1)
    with pytest.raises(RequestError, match=artist.id.fingerprint[:12]) as raised:
        redraw_png(path, "cpu", other)
    assert read_bundle(other).fingerprint[:12] in str(raised.value)
    zipped = shutil.copytree(tiny_bundle, tmp_path / "moved")
    (copy,) = redraw_png(path, "cpu", zipped).save(tmp_path / "y.png")
    assert copy.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kind": "grid"}, "only single pictures"),
        ({"seed": "7"}, "expected int"),
        ({"seed": -1}, "seed"),
        ({"candidate": 4096}, "candidate"),
        ({"prompt": " "}, "prompt"),
        ({"mood": 1}, "unknown field 'mood'"),
        ({"settings": {"top_p": 2.0}}, "top_p"),
        ({"codes": [[1, 2]]}, "4 x 4 codes"),
        ({"codes": [[99] * 4] * 4}, "codes of 0 to 31"),
        ({"kind": "complete"}, "a rectangle and forced codes"),
        ({"kind": "complete", "rectangle": [9, 9, 3, 3], "forced": [[0] * 4] * 4}, "redraw x2"),
        ({"model": "/nowhere/at/all"}, "no model"),
    ],
)
def test_damaged_records(artist: Artist, tmp_path: Path, change: dict, problem: str) -> None:
    drawing = artist.draw(PROMPT, candidates=1)
    (path,) = drawing.save(tmp_path / "x.png")
    save_png(drawing.images[0], path, {**read_record(path), **change}, force=True)
    with pytest.raises(RequestError, match=problem):
        redraw_png(path, "cpu")


def test_redraw_tells_when_the_codes_differ(artist: Artist, tmp_path: Path) -> None:
    drawing = artist.draw(PROMPT, candidates=1)
    (path,) = drawing.save(tmp_path / "x.png")
    record = read_record(path)
    record["codes"][1][2] = (record["codes"][1][2] + 1) % 32
    save_png(drawing.images[0], path, record, force=True)
    with pytest.raises(WorkError, match="1 of 16 codes"):
        redraw_png(path, "cpu")


def test_stream(artist: Artist) -> None:
    *partial, drawing = artist.draw_stream(PROMPT, seed=6)
    assert len(partial) == 4 and all(isinstance(p, Image.Image) for p in partial)
    same(drawing, artist.draw(PROMPT, candidates=1, seed=6), 1)
    assert (pixels(partial[-1]) == pixels(drawing.images[0])).all()
    for row, image in enumerate(partial, start=1):
        assert (pixels(image)[4 * row :] == 128).all()
        assert (pixels(image)[4 * row - 1] != 128).any()
    with pytest.raises(RequestError):  # at the call, not at the first picture
        artist.draw_stream("")


rectangles = st.tuples(st.integers(0, 15), st.integers(0, 15), st.integers(1, 16), st.integers(1, 16)).filter(
    lambda r: r[0] < r[2] and r[1] < r[3]
)


@settings(max_examples=25)
@given(rectangle=rectangles, seed=st.integers(0, 2**63 - 1))
def test_complete_keeps_what_is_outside(
    artist: Artist, photo: Image.Image, rectangle: tuple[int, int, int, int], seed: int
) -> None:
    image = photo.crop((0, 0, 16, 16))
    drawing = artist.complete(image, PROMPT, redraw=rectangle, candidates=2, seed=seed)
    x, y, x2, y2 = rectangle
    outside = np.ones((16, 16), dtype=bool)
    outside[y:y2, x:x2] = False
    touched = np.zeros((4, 4), dtype=bool)
    touched[y // 4 : (y2 + 3) // 4, x // 4 : (x2 + 3) // 4] = True
    given_codes = artist.encode(image)[0]
    for picture, codes in zip(drawing.images, drawing.codes, strict=True):
        assert (pixels(picture)[outside] == pixels(image)[outside]).all()
        assert (codes[~touched] == given_codes[~touched]).all()
        inside = pixels(artist.decode(codes[None])[0])[~outside]
        assert (pixels(picture)[~outside] == inside).all()
    assert drawing.forced is not None and ((drawing.forced == FREE) == touched).all()


def test_complete_whole_and_top(artist: Artist, photo: Image.Image) -> None:
    whole = artist.complete(photo, PROMPT, keep_top=0.0, seed=8)
    same(whole, artist.draw(PROMPT, seed=8), 4)
    half = artist.complete(photo, PROMPT, candidates=1)
    assert (
        half.rectangle
        == artist.complete(photo, PROMPT, redraw=(0, 8), candidates=1).rectangle
        == (0, 8, 16, 16)
    )
    kept = photo.crop((5, 0, 35, 30)).resize((16, 16), Image.Resampling.BOX)
    assert (pixels(half.images[0])[:8] == pixels(kept)[:8]).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"redraw": (0, 16)},
        {"redraw": (-1, 0)},
        {"redraw": (4, 4, 4, 8)},
        {"redraw": (4, 4, 8, 17)},
        {"redraw": (4, 4, 8)},
        {"redraw": 4},
        {"redraw": (0.5, 1)},
        {"redraw": (0, 0), "keep_top": 0.5},
        {"keep_top": 1.0},
        {"keep_top": -0.1},
        {"keep_top": math.nan},
        {"keep_top": "half"},
    ],
)
def test_wrong_rectangles(artist: Artist, photo: Image.Image, wrong: dict) -> None:
    with pytest.raises(RequestError, match="redraw|keep_top") as raised:
        artist.complete(photo, PROMPT, **wrong)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": ""},
        {"prompt": " \n "},
        {"prompt": "x" * 10_001},
        {"prompt": b"bytes"},
        {"candidates": 0},
        {"candidates": 4097},
        {"candidates": 2.0},
        {"candidates": True},
        {"keep": 5},
        {"keep": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": None},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": "warm"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.5},
        {"guidance": math.inf},
    ],
)
def test_wrong_requests(artist: Artist, wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(RequestError, match=name):
        artist.draw(**{"prompt": PROMPT, **wrong})


def test_long_and_odd_prompts(artist: Artist, caplog: pytest.LogCaptureFixture) -> None:
    artist.draw("red " * 2500, candidates=1)
    assert "cut to 8 tokens" in caplog.text
    for prompt in ("\ud800", "사과 🍎", "\0", "<|endoftext|>"):
        artist.draw(prompt, candidates=1)


def test_encode_and_decode(artist: Artist, photo: Image.Image) -> None:
    codes = artist.encode([photo] * 9)
    assert codes.shape == (9, 4, 4) and codes.dtype == np.int64 and (codes == codes[0]).all()
    assert (artist.encode(photo)[0] == codes[0]).all()
    mixed = np.random.default_rng(0).integers(0, 32, (9, 4, 4))
    images = artist.decode(mixed)
    for i in (0, 7, 8):  # not even the last bit depends on the neighbours
        assert (pixels(artist.decode(mixed[i : i + 1])[0]) == pixels(images[i])).all()
    assert len(artist.decode(mixed.tolist())) == 9


def test_encode_any_mode(artist: Artist) -> None:
    for mode in ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16"):
        assert artist.encode(Image.new(mode, (20, 9))).shape == (1, 4, 4)
    clear, white = Image.new("RGBA", (16, 16), (0, 0, 0, 0)), Image.new("RGB", (16, 16), "white")
    assert (artist.encode(clear) == artist.encode(white)).all()


@pytest.mark.parametrize(
    "wrong", [[], ["x.png"], [None], [Image.new("F", (9, 9))], [Image.new("RGB", (0, 9))]]
)
def test_wrong_images(artist: Artist, wrong: list) -> None:
    with pytest.raises(RequestError, match="image"):
        artist.encode(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4), int),
        np.zeros((1, 4, 5), int),
        np.zeros((0, 4, 4), int),
        np.zeros((1, 4, 4)),
        np.full((1, 4, 4), 32),
        np.full((1, 4, 4), -1),
        [[[1], [2, 3]]],
        None,
    ],
)
def test_wrong_codes(artist: Artist, wrong: object) -> None:
    with pytest.raises(RequestError, match="codes: expected"):
        artist.decode(wrong)  # type: ignore[arg-type]


def test_likelihood(artist: Artist, photo: Image.Image) -> None:
    bits = artist.likelihood(photo, PROMPT)
    assert math.isfinite(bits) and bits > 0
    codes = torch.from_numpy(artist.encode(photo)).flatten(1)
    tokens = torch.from_numpy(artist.text_tokenizer.encode([PROMPT], 8))
    with torch.no_grad():
        log_p = artist.prior(tokens, codes)[1].log_softmax(-1).gather(-1, codes[..., None]).mean()
    assert bits == pytest.approx(-float(log_p) / math.log(2), rel=1e-5)


def test_rank_needs_a_ranker(artist: Artist, photo: Image.Image) -> None:
    with pytest.raises(RequestError, match="no ranker"):
        artist.rank([photo], PROMPT)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Artist:
    """An artist with a ranker, and the same weights otherwise as `artist`."""
    return load_artist(write_tiny_bundle(tmp_path_factory.mktemp("ranked") / "tiny", ranked=True), "cpu")


def test_with_a_ranker_the_best_of_all_candidates_come_first(artist: Artist, ranked: Artist) -> None:
    plain, drawing = artist.draw(PROMPT, candidates=9), ranked.draw(PROMPT, candidates=9)
    assert sorted(drawing.candidates) == plain.candidates and drawing.candidates != plain.candidates
    assert drawing.scores == sorted(drawing.scores, reverse=True) and len(set(drawing.scores)) > 1
    for i, c in enumerate(drawing.candidates):
        assert (drawing.codes[i] == plain.codes[c]).all()
        assert (pixels(drawing.images[i]) == pixels(plain.images[c])).all()
        assert drawing.scores[i] == pytest.approx(ranked.rank([plain.images[c]], PROMPT)[0], abs=1e-6)
    few = ranked.draw(PROMPT, candidates=5)  # a candidate's score does not depend on how many there are
    assert dict(zip(few.candidates, few.scores, strict=True)).items() <= dict(
        zip(drawing.candidates, drawing.scores, strict=True)
    ).items()
    kept = ranked.draw(PROMPT, candidates=9, keep=2)
    assert kept.candidates == drawing.candidates[:2] and kept.scores == drawing.scores[:2]
    assert ranked.draw(PROMPT, candidates=9, keep=0).candidates == drawing.candidates


@pytest.mark.parametrize(("count", "keep", "left"), [(9, 0, 5), (9, 2, 5), (9, 7, 7), (40, 0, 20), (1, 0, 1)])
def test_halving_finishes_the_candidates_with_the_better_upper_halves(
    ranked: Artist, count: int, keep: int, left: int
) -> None:
    told: list[tuple[int, int]] = []
    halved = ranked.draw(PROMPT, candidates=count, keep=keep, halve=True, progress=lambda *done: told.append(done))
    whole = ranked.draw(PROMPT, candidates=count)
    by_candidate = {c: i for i, c in enumerate(whole.candidates)}
    for i, c in enumerate(halved.candidates):  # each is what it is without
        assert (halved.codes[i] == whole.codes[by_candidate[c]]).all()
        assert halved.scores[i] == whole.scores[by_candidate[c]]
    assert halved.scores == sorted(halved.scores, reverse=True)
    assert len(halved.images) == (keep or left)

    def score(c: int) -> float:
        """Of the upper half and what it is in a mirror, as the codes of both are decoded."""
        codes = whole.codes[by_candidate[c]].copy()
        codes[2:] = codes[1::-1]
        image = pixels(ranked.decode(codes[None])[0]).copy()
        image[8:] = image[7::-1]
        return ranked.rank([Image.fromarray(image)], PROMPT)[0]

    better = sorted(range(count), key=lambda c: -score(c))[:left]
    assert set(halved.candidates) <= set(better) and (keep or set(halved.candidates) == set(better))
    assert told[-1] == (count, count) and told == sorted(told)


def test_halving_needs_a_ranker(artist: Artist) -> None:
    with pytest.raises(RequestError, match="no ranker"):
        artist.draw(PROMPT, halve=True)


def test_halves_of_an_odd_grid_are_mirrored_about_where_drawing_stopped(ranked: Artist) -> None:
    codes = np.arange(16).reshape(1, 4, 4) % ranked.image_tokenizer.codebook_size
    (image,) = ranked._mirrored(codes, 3)
    assert (pixels(image)[12:] == pixels(image)[11:7:-1]).all()


def test_likelihoods_are_minus_bits_a_code_without_a_caption(ranked: Artist) -> None:
    codes = ranked.draw(PROMPT, candidates=9).codes
    found = ranked.likelihoods(codes)
    tokens = torch.full((1, ranked.shape.text_length), ranked.text_tokenizer.pad_id)
    for one, value in zip(codes, found, strict=True):
        flat = torch.from_numpy(one).flatten()[None]
        with torch.inference_mode():
            log_p = ranked.prior(tokens, flat)[1][0].log_softmax(-1)[torch.arange(16), flat[0]]
        assert value == pytest.approx(float(log_p.mean()) / math.log(2), abs=1e-5)
    assert ranked.likelihoods(codes[3:4]) == found[3:4] and ranked.likelihoods(codes[:0]) == []


def test_naturalness_counts_how_likely_a_picture_is_by_itself(ranked: Artist, tmp_path: Path) -> None:
    plain = ranked.draw(PROMPT, candidates=9)
    drawing = ranked.draw(PROMPT, candidates=9, naturalness=2.0)
    cosines = dict(zip(plain.candidates, plain.scores, strict=True))
    for i, c in enumerate(drawing.candidates):
        (likelihood,) = ranked.likelihoods(drawing.codes[i : i + 1])
        assert drawing.scores[i] == pytest.approx(cosines[c] + 2 * likelihood, abs=1e-6)
    assert drawing.scores == sorted(drawing.scores, reverse=True) and drawing.candidates != plain.candidates
    (path,) = ranked.draw(PROMPT, candidates=9, keep=1, naturalness=2.0).save(tmp_path / "a.png")
    assert read_record(path)["settings"]["naturalness"] == 2.0 and ranked.redraw(path).scores == drawing.scores[:1]
    with pytest.raises(RequestError, match="naturalness: expected 0 to 100"):
        ranked.draw(PROMPT, naturalness=-1.0)


def test_completions_are_ranked_too(ranked: Artist, photo: Image.Image) -> None:
    drawing = ranked.complete(photo, PROMPT, candidates=5, keep=3)
    assert len(drawing.images) == len(drawing.candidates) == 3
    assert drawing.scores == sorted(drawing.scores, reverse=True)
    assert drawing.scores == pytest.approx(ranked.rank(drawing.images, PROMPT), abs=1e-6)


def test_scores_are_cosines_and_depend_on_picture_and_prompt(ranked: Artist, photo: Image.Image) -> None:
    other = Image.new("RGB", (16, 16), "red")
    scores = ranked.rank([photo, other], PROMPT)
    assert all(-1 <= s <= 1 for s in scores) and scores[0] != scores[1]
    assert ranked.rank([other], PROMPT) == pytest.approx(scores[1:], abs=1e-6)
    assert ranked.rank([photo, other], "a green star") != scores
    with pytest.raises(RequestError, match="images: expected at least one"):
        ranked.rank([], PROMPT)


def test_a_score_is_kept_in_the_png_and_found_again(ranked: Artist, tmp_path: Path) -> None:
    drawing = ranked.draw(PROMPT, candidates=3, keep=1)
    (path,) = drawing.save(tmp_path / "a.png")
    assert read_record(path)["score"] == drawing.scores[0]
    again = ranked.redraw(path)
    assert again.scores == drawing.scores
    (second,) = again.save(tmp_path / "b.png")
    assert second.read_bytes() == path.read_bytes()


def test_bundles_that_do_not_fit(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    weights = {part: bundle.weights(part) for part in bundle.parts}

    def refused(
        problem: str, *, tokenizer: str | None = bundle.text_tokenizer, parts: dict = weights, **info: object
    ):
        kept = {k: v for k, v in bundle.info.items() if k not in ("format_version", "files", "digest")}
        write_bundle(
            tmp_path / "b", info={**kept, **info}, card=bundle.card, text_tokenizer=tokenizer, weights=parts
        )
        with pytest.raises(BundleError, match=problem) as raised:
            load_artist(tmp_path / "b", "cpu")
        assert "\n" not in str(raised.value)

    recipe = bundle.info["recipe"]
    wider = {**recipe, "prior": {**recipe["prior"], "d_model": 64}}
    refused("prior.safetensors does not fit", recipe=wider)
    refused("recipe.prior.*n_head", recipe={**recipe, "prior": {**recipe["prior"], "n_head": 5}})
    refused(
        "unknown field 'recipe.image_tokenizer.n_hidd'", recipe={**recipe, "image_tokenizer": {"n_hidd": 3}}
    )
    refused("lacks .*'drawing'", recipe={k: v for k, v in recipe.items() if k != "drawing"})
    refused("lacks", recipe=None)
    refused("text_tokenizer.json has", text_vocab_size=7)
    refused("no text_tokenizer.json", tokenizer=None)
    refused("no 'prior' in this bundle", parts={"image_tokenizer": weights["image_tokenizer"]})


def test_load(tiny_bundle: Path) -> None:
    assert isinstance(armchair.load(tiny_bundle), armchair.Artist)
    assert armchair.load(str(tiny_bundle), "cpu").model == str(tiny_bundle)
    with pytest.raises(armchair.RequestError, match="device"):
        armchair.load(tiny_bundle, "tpu")
    with pytest.raises(armchair.BundleError, match="nowhere"):
        armchair.load("nowhere")


def test_imports() -> None:
    """`import armchair` costs nothing, and drawing needs nothing of training."""
    code = (
        "import sys, armchair, armchair.cli; assert 'torch' not in sys.modules;"
        "armchair.Drawing; bad = ('armchair.train', 'armchair.data', 'yaml', 'armchair.shapes');"
        "assert not [m for m in sys.modules if m.startswith(bad)]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
