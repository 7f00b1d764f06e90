"""`armchair export`: the same codes from a smaller bundle, and every other command goes on working with it."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny
from armchair.bundle import read_bundle, write_bundle
from armchair.errors import BundleError, RequestError
from armchair.prior.transformer import Prior
from armchair.sample.engine import default_weights, exact_products
from armchair.sample.export import export_bundle
from armchair.sample.pipeline import Artist, load_artist, redraw_png
from armchair.sample.weights import matrices
from conftest import write_tiny_bundle

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four patterns, rotary, vectors of codes that are computed, and a ranker."""
    return write_tiny_bundle(tmp_path_factory.mktemp("original") / "tiny", ranked=True, options=tiny.OPTIONS["rotary"])


@pytest.fixture(scope="module")
def eight(original: Path) -> Path:
    out = original.parent / "eight"
    export_bundle(original, out)
    return out


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    pixels = np.random.Generator(np.random.PCG64(0)).integers(256, size=(30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def all_drawings(artist: Artist, photo: Image.Image) -> list[Tensor]:
    *_, streamed = artist.draw_stream(PROMPT, seed=3)
    drawn = artist.draw(PROMPT, candidates=5, seed=3, guidance=2.5), artist.draw(PROMPT, candidates=1)
    return [torch.from_numpy(d.codes) for d in (*drawn, streamed, artist.complete(photo, PROMPT, candidates=2))]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("options", ["paper", "rotary", "all"])
def test_the_same_codes_as_the_bundle_it_came_from(
    tmp_path: Path, photo: Image.Image, seed: int, options: str
) -> None:
    if not exact_products():
        pytest.skip("this processor does not draw in eight bits")
    write_tiny_bundle(tmp_path / "tiny", seed, options=tiny.OPTIONS[options])
    for out in (tmp_path / "eight", tmp_path / "eight.zip"):
        export_bundle(tmp_path / "tiny", out)
        drawings = zip(
            all_drawings(load_artist(tmp_path / "tiny", "cpu", weights="int8"), photo),
            all_drawings(load_artist(out, "cpu", weights="int8"), photo),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in drawings)


def test_what_is_in_it(original: Path, eight: Path) -> None:
    source, bundle = read_bundle(original), read_bundle(eight)
    assert bundle.name == "tiny-int8" and bundle.fingerprint != source.fingerprint
    assert bundle.info["exported"] == {"format": "int8", "name": "tiny", "fingerprint": source.fingerprint}
    told = {name: value for name, value in bundle.info.items() if name not in ("name", "exported")}
    assert told == {name: value for name, value in source.info.items() if name != "name"}
    said = f"Exported from tiny ({source.fingerprint[:12]}): the prior has eight bits a weight."
    assert bundle.card.startswith(f"# tiny-int8\n\n{said}") and "Licence: none" in bundle.card
    assert bundle.text_tokenizer == source.text_tokenizer
    for part in ("image_tokenizer", "ranker"):
        before, now = source.weights(part), bundle.weights(part)
        assert before.keys() == now.keys() and all(torch.equal(now[name], w) for name, w in before.items())
    before, now = source.weights("prior"), bundle.weights("prior")
    rounded = matrices(load_artist(original, "cpu").prior.config)
    assert {name for name, w in now.items() if w.dtype == torch.int8} == {f"{name}.weight" for name in rounded}
    # What was not rounded, folded or scaled has its 16 bits still.
    same = [name for name, w in now.items() if w.dtype == torch.float16]
    assert all(torch.equal(now[name], before[name]) for name in same)
    wider = {name for name, w in now.items() if w.dtype == torch.float32 and not name.endswith(".step")}
    assert wider == {"image_embedding.weight", *(f"blocks.{i}.attention.qkv.bias" for i in range(4))}


def test_an_export_is_a_function_of_the_bundle(original: Path, eight: Path, tmp_path: Path) -> None:
    export_bundle(original, tmp_path / "other name.zip")
    assert read_bundle(tmp_path / "other name.zip").fingerprint == read_bundle(eight).fingerprint


def test_a_card_without_a_title_is_kept_whole(original: Path, tmp_path: Path) -> None:
    bundle = read_bundle(original)
    weights = {part: bundle.weights(part) for part in bundle.parts}
    tokenizer = bundle.text_tokenizer
    write_bundle(tmp_path / "b", info=bundle.info, card="Circles.\n", text_tokenizer=tokenizer, weights=weights)
    export_bundle(tmp_path / "b", tmp_path / "out")
    card = read_bundle(tmp_path / "out").card
    assert card.startswith("# tiny-int8\n\nExported from") and card.endswith("\n\nCircles.\n")


def test_drawing_makes_no_prior_of_32_bits(
    eight: Path, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    start = Prior.__init__
    monkeypatch.setattr(Prior, "__init__", lambda self, *args: made.append(1) or start(self, *args))
    artist = load_artist(eight, "cpu")
    all_drawings(artist, photo)
    assert artist.draw_each([PROMPT, "a blue square"])
    (path,) = artist.draw(PROMPT, candidates=1).save(tmp_path / "a.png")
    artist.redraw(path)
    load_artist(eight, "cpu", weights="fp32").draw(PROMPT, candidates=1)
    assert not made
    artist.likelihood(photo, PROMPT)
    artist.likelihood(photo, PROMPT)
    assert len(made) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_matrices_stay_in_the_file(eight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a product of PyTorch reads lies where the file is mapped: nothing of it was copied."""
    if not exact_products():
        pytest.skip("this processor does not draw in eight bits")
    monkeypatch.setenv("ARMCHAIR_NATIVE", "0")  # compiled code has a layout of its own
    engine = load_artist(eight, "cpu", weights="int8").decoder()
    lines = Path("/proc/self/maps").read_text().splitlines()
    file = str((eight / "prior.safetensors").resolve())
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines if line.endswith(file)]
    for product in (engine.head, *(layer.qkv for layer in engine.layers)):
        assert any(start <= product.codes.data_ptr() < end for start, end in spans)


@pytest.mark.parametrize("weights", ["fp32", "bf16", default_weights()])
def test_every_form_of_weights_draws_and_redraws(eight: Path, tmp_path: Path, weights: str) -> None:
    drawing = load_artist(eight, "cpu", weights=weights).draw(PROMPT, candidates=2)
    path = drawing.save(tmp_path / "a.png")[1]
    (again,) = redraw_png(path, "cpu").save(tmp_path / "b.png")
    assert again.read_bytes() == path.read_bytes()


def test_a_drawing_of_the_original_asks_for_the_original(original: Path, eight: Path, tmp_path: Path) -> None:
    (path,) = load_artist(original, "cpu").draw(PROMPT, candidates=1).save(tmp_path / "a.png")
    with pytest.raises(RequestError, match=r"drawn with bundle tiny \(.* is tiny-int8 \("):
        load_artist(eight, "cpu").redraw(path)


def test_the_likelihood_is_nearly_the_same(original: Path, eight: Path, photo: Image.Image) -> None:
    """A weight is off by half a step at most, a 254th of its row's largest, and the errors of a row mostly cancel.

    Of eight tiny models of random weights, which are surer and so touchier than trained ones, the worst is off by 1 %.
    """
    a, b = (load_artist(path, "cpu").likelihood(photo, PROMPT) for path in (original, eight))
    assert 0 < abs(a - b) < 0.02 * a


# What is not as it should be.


def refused(tmp_path: Path, eight: Path, problem: str, prior: Mapping[str, Tensor], **info: object) -> None:
    """A bundle whose bytes are as they were written, and are not what its recipe asks for."""
    bundle = read_bundle(eight)
    weights: dict[str, Mapping[str, Tensor]] = {part: bundle.weights(part) for part in bundle.parts}
    write_bundle(
        tmp_path / "b",
        info={**bundle.info, **info},
        card=bundle.card,
        text_tokenizer=bundle.text_tokenizer,
        weights={**weights, "prior": prior},
    )
    with pytest.raises(BundleError, match=problem) as raised:
        load_artist(tmp_path / "b", "cpu")
    assert "\n" not in str(raised.value)


def test_damage_is_one_clear_error(original: Path, eight: Path, tmp_path: Path) -> None:
    prior = read_bundle(eight).weights("prior")
    name = "blocks.2.mlp_in"
    without = {key: w for key, w in prior.items() if key != f"{name}.step"}
    fits = "prior.safetensors does not fit the bundle's recipe:"
    refused(tmp_path, eight, f"{fits} {name}.step is missing", without)
    refused(tmp_path, eight, f"{fits} {name}.step: expected the shape", without | {f"{name}.step": torch.ones(1)})
    turned = {f"{name}.weight": prior[f"{name}.weight"].T}
    refused(tmp_path, eight, rf"{fits} {name}.weight: .*\(128, 32\), got \(32, 128\)", {**prior, **turned})
    refused(tmp_path, eight, f"{fits} blocks.0.attention.out.step is missing", read_bundle(original).weights("prior"))
    unknown = {"format": "int4", "name": "tiny", "fingerprint": "0"}
    refused(tmp_path, eight, "bundle.json: .*format.*'int8'", prior, exported=unknown)
    refused(tmp_path, eight, "bundle.json: .*exported", prior, exported=8)


def test_a_flipped_byte_is_found(eight: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(eight, tmp_path / "copy")
    data = bytearray((copy / "prior.safetensors").read_bytes())
    data[-5] ^= 1
    (copy / "prior.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match="prior.safetensors is altered"):
        load_artist(copy, "cpu")


def test_wrong_requests(original: Path, eight: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="format.*'int8'"):
        export_bundle(original, tmp_path / "x", "int4")
    with pytest.raises(RequestError, match="there already"):
        export_bundle(original, eight)
    with pytest.raises(RequestError, match="exported already"):
        export_bundle(eight, tmp_path / "x")
    with pytest.raises(BundleError, match="nowhere"):
        export_bundle("nowhere", tmp_path / "x")
    assert not (tmp_path / "x").exists()
