"""Training pictures that were planted in a benchmark are found, and others are not."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from armchair.cli import main
from armchair.data.sources import Sample
from armchair.errors import DataError
from armchair.eval.overlap import find_overlap, perceptual_hash
from armchair.image.pixels import BrokenSample
from armchair.sample.ranker import load_ranker
from conftest import write_tiny_bundle


def picture(seed: int) -> np.ndarray:
    """Smooth coloured blobs, 80 x 64."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((80, 64), Image.Resampling.BICUBIC))


def jpeg(image: np.ndarray) -> np.ndarray:
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="JPEG", quality=70)
    return np.asarray(Image.open(data).convert("RGB"))


CHANGES = {
    "saved again": jpeg,
    "resized": lambda x: np.asarray(Image.fromarray(x).resize((50, 40), Image.Resampling.BICUBIC)),
    "cropped": lambda x: x[1:-2, 1:-3],
    "brightened": lambda x: np.asarray(ImageEnhance.Brightness(Image.fromarray(x)).enhance(1.15)),
}


class Pictures:
    def __init__(self, name: str, images: list[np.ndarray | None]):
        self.name, self.images = name, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Sample:
        if (image := self.images[i]) is None:
            raise BrokenSample("damaged image")
        return Sample(image, ("a picture",))

    def key(self, i: int) -> str:
        return f"{self.name}/{i}"


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_picture_is_found_and_others_are_not(change: str) -> None:
    train = Pictures("train", [None, *(picture(seed) for seed in range(60))])
    others, planted = [picture(1000 + n) for n in range(40)], [CHANGES[change](picture(n)) for n in range(20)]
    bench = Pictures("bench", [*others, *planted, None])
    found = find_overlap(train, bench, shown=8)
    assert len(found.matches) == 60
    assert {(m.bench, m.train) for m in found.duplicates} == {(f"bench/{40 + n}", f"train/{1 + n}") for n in range(20)}
    distances = [m.distance for m in found.matches]
    assert distances == sorted(distances)
    assert found.sheet(8).width > 0


def test_a_hash_has_length_one_and_tells_colours_apart() -> None:
    red, blue = (np.full((64, 64, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 200)))
    assert np.linalg.norm(perceptual_hash(picture(0))) == pytest.approx(1, abs=1e-5)
    assert perceptual_hash(red) @ perceptual_hash(blue) < 0.5
    assert np.isfinite(perceptual_hash(np.zeros((8, 8, 3), np.uint8))).all()


def test_through_a_ranker_the_same_picture_is_at_no_distance(tmp_path: Path) -> None:
    ranker = load_ranker(write_tiny_bundle(tmp_path / "tiny", ranked=True), "cpu")
    found = find_overlap(
        Pictures("train", [picture(0), picture(1)]), Pictures("bench", [picture(1)]), ranker=ranker, shown=0
    )
    assert found.matches[0].train == "train/1" and found.matches[0].distance == pytest.approx(0, abs=1e-5)
    assert found.by.startswith("ranker of tiny")


def test_a_side_with_no_picture_is_refused() -> None:
    good, bad = Pictures("good", [picture(0)]), Pictures("bad", [None])
    for sides in ((good, bad), (bad, good)):
        with pytest.raises(DataError, match="none is readable"):
            find_overlap(*sides)


def test_the_command_writes_a_list_that_evaluate_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side, seeds in (("train", range(12)), ("bench", (3, 7, 100, 101))):
        (tmp_path / side).mkdir()
        for seed in seeds:
            Image.fromarray(picture(seed)).save(tmp_path / side / f"{seed}.png")
            (tmp_path / side / f"{seed}.txt").write_text("a picture\n")
    sides, out = (str(tmp_path / "train"), str(tmp_path / "bench")), tmp_path / "list"
    sheet = tmp_path / "sheet.png"
    assert main(["data", "overlap", *sides, "--out", str(out), "--sheet", str(sheet)]) == 0
    assert "2 (50.0%)" in capsys.readouterr().out
    assert {Path(line).stem for line in out.read_text().split()} == {"3", "7"}
    with Image.open(sheet) as shown:
        shown.load()
    assert main(["data", "overlap", *sides, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["data", "overlap", *sides, "--json", "--threshold", "0"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["threshold"] == 0 and len(data["matches"]) == 4
    assert main(["data", "overlap", *sides, "--threshold", "3"]) == 2
