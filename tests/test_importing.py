"""`armchair import openai-clip`: weight files of every kind become a ranker, and nothing in them is run."""

import gzip
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import tiny
from armchair.cli import main
from armchair.clip.model import CLIP
from armchair.clip.released import config_of, renamed
from armchair.clip.weight_file import read_weights
from armchair.errors import BundleError, RequestError
from armchair.sample.pipeline import load_artist
from armchair.sample.png import read_record
from armchair.sample.ranker import load_ranker
from armchair.text.clip_bpe import ClipTextTokenizer
from released_weights import released

MERGES = ["#version: 0.2", "r e", "re d</w>", "a p", "ap p", "l e</w>", "app le</w>", ""]
VOCAB = 512 + 6 + 2
KINDS = ("model.safetensors", "pytorch_model.bin", "checkpoint.pt", "ViT-B-32.pt")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return released(False, (1,), vocab=VOCAB)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> Path:
    """One model in each kind of file, and the merges."""
    folder = tmp_path_factory.mktemp("released")
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(MERGES).encode()))
    safetensors.torch.save_file(weights, folder / KINDS[0])
    torch.save(weights, folder / KINDS[1])
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, folder / KINDS[2])
    tree = nn.Module()
    for name, w in weights.items():
        *path, leaf = name.split(".")
        at = tree
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.register_parameter(leaf, nn.Parameter(w.half() if w.ndim > 1 else w))  # OpenAI's are in 16 bits
    tree.register_buffer("input_resolution", torch.tensor(64))
    torch.jit.save(torch.jit.script(tree), folder / KINDS[3])
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_weights(folder: Path, weights: dict[str, Tensor], kind: str) -> None:
    found = read_weights(folder / kind)
    assert set(found) - {"input_resolution"} == set(weights)
    half = kind == KINDS[3]
    for name, w in weights.items():
        torch.testing.assert_close(found[name].float(), w, rtol=1e-3 if half else 0, atol=1e-3 if half else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_ranker_scores_as_its_weights_say(folder: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "clip"
    assert main(["import", "openai-clip", str(folder / kind), "--out", str(out)]) == 0
    ranker = load_ranker(out, "cpu")
    state = read_weights(folder / kind)
    model = CLIP(*config_of(state)).eval()
    model.load_state_dict(renamed(state))
    tokenizer = ClipTextTokenizer.from_merges(folder / "bpe_simple_vocab_16e6.txt.gz")
    pixels = tiny.pictures(3, 64)
    images = [Image.fromarray((p.permute(1, 2, 0) * 255).round().byte().numpy()) for p in pixels]
    with torch.no_grad():
        shown = model.encode_images((pixels * 255).round() / 255)
        said = model.encode_text(torch.from_numpy(tokenizer.encode(["a red apple"], 7)))
    assert ranker.rank(images, "a red apple") == pytest.approx((shown @ said[0]).tolist(), abs=1e-5)
    assert len(set(ranker.rank(images, "a red apple"))) == 3


def test_another_ranker_judges_drawings(folder: Path, tiny_bundle: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["import", "openai-clip", str(folder / KINDS[0]), "--out", "clip.zip"]) == 0
    flags = ["-n", "5", "--keep", "2", "--json", "--ranker", "clip.zip"]
    capsys.readouterr()
    assert main(["draw", "a red apple", "--model", str(tiny_bundle), *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    scores = [image["score"] for image in result["images"]]
    assert len(scores) == 2 and scores == sorted(scores, reverse=True)
    assert result["ranker"]["name"] == "clip"
    path = Path(result["images"][0]["path"])
    assert read_record(path)["ranker"] == result["ranker"]
    # The picture is drawn again without the ranker, which only chose it.
    assert main(["redraw", str(path), "--out", "again.png"]) == 0
    assert Path("again.png").read_bytes() == path.read_bytes()
    ranked = load_artist(tiny_bundle, "cpu", ranker="clip.zip")
    picture = Image.open(path)
    assert ranked.rank([picture], "a red apple")[0] == pytest.approx(scores[0], abs=1e-5)


def test_a_ranker_alone_draws_nothing_and_says_so(folder: Path, tmp_path: Path, tiny_bundle: Path, capsys) -> None:
    out = tmp_path / "clip"
    assert main(["import", "openai-clip", str(folder / KINDS[0]), "--out", str(out)]) == 0
    with pytest.raises(BundleError, match="only ranks"):
        load_artist(out, "cpu")
    with pytest.raises(BundleError, match="has no ranker"):
        load_ranker(tiny_bundle, "cpu")
    assert main(["info", str(out)]) == 0
    assert "draws nothing" in capsys.readouterr().out
    assert main(["import", "openai-clip", str(folder / KINDS[0]), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["import", "openai-clip", str(folder / KINDS[1]), "--out", str(out), "--force"]) == 0


class Trap:
    """Unpickled, it makes the file that tells of it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["pickle", "state dict", "archive"])
def test_nothing_in_a_weight_file_is_run(tmp_path: Path, kind: str) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "weights.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"a": Trap(sprung)}, protocol=2))
    elif kind == "state dict":
        torch.save({"a": Trap(sprung)}, path)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weights/data.pkl", pickle.dumps(Trap(sprung), protocol=2))
            archive.writestr("weights/constants.pkl", b"")
    with pytest.raises(RequestError, match="not a file of weights alone"):
        read_weights(path)
    assert not sprung.exists()


def test_wrong_files_are_refused_in_one_line(folder: Path, tmp_path: Path, weights: dict[str, Tensor], capsys) -> None:
    def refused(*argv: object) -> str:
        capsys.readouterr()
        assert main(["import", "openai-clip", *map(str, argv), "--out", str(tmp_path / "out")]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return captured.err

    vocabulary = ("--vocabulary", folder / "bpe_simple_vocab_16e6.txt.gz")
    assert "no such file" in refused(tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes((folder / KINDS[1]).read_bytes()[:2000])
    assert "not a file of weights alone" in refused(tmp_path / "cut.pt", *vocabulary)
    (tmp_path / "cut.safetensors").write_bytes((folder / KINDS[0]).read_bytes()[:2000])
    assert "not a safetensors file" in refused(tmp_path / "cut.safetensors", *vocabulary)
    assert "--vocabulary" in refused(tmp_path / "cut.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    assert "is missing" in refused(tmp_path / "other.pt", *vocabulary)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "expected a state dict" in refused(tmp_path / "list.pt", *vocabulary)
    (tmp_path / "short.txt").write_text("\n".join(MERGES[:-2]))
    assert "text tokens" in refused(folder / KINDS[0], "--vocabulary", tmp_path / "short.txt")
    lacking = {k: v for k, v in weights.items() if k != "visual.ln_post.bias"}
    torch.save(lacking, tmp_path / "lacking.pt")
    assert "not all of a released CLIP" in refused(tmp_path / "lacking.pt", *vocabulary)
    assert "quick_gelu" in refused(folder / KINDS[0], "--activation", "quickgelu")
