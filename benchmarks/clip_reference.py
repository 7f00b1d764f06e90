"""Whether imported CLIP weights give what the reference implementation gives, and text the same tokens.

    pip install --no-deps clip-anytorch && pip install ftfy regex
    python benchmarks/clip_reference.py --json clip_reference.json

Random weights in the shapes of ViT-B/32 and RN50 go through the reference's own model, and through `armchair import
openai-clip` and the bundle that it writes: the largest difference of logits (want at most 1e-4). 1,000 strings, from
captions, other scripts, broken encodings, entities, emoji and noise, go through both text tokenizers (want none that
differs).
The reference's two files are loaded by their paths, as its package needs torchvision.
"""

import argparse
import importlib.util
import json
import random
import sys
import tempfile
import unicodedata
from pathlib import Path
from types import ModuleType

import safetensors.torch
import torch

from armchair.cli import main as armchair
from armchair.sample.ranker import load_ranker
from armchair.shapes.captions import prompts
from armchair.text.clip_bpe import ClipTextTokenizer

# embed, resolution, image layers, image width, patch, then the text tower's length, vocabulary, width, heads, layers
SHAPES = {
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12),
}
STRINGS = 1000


def reference(name: str) -> tuple[ModuleType, Path]:
    spec = importlib.util.find_spec("clip")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the reference is not here: pip install --no-deps clip-anytorch, and ftfy and regex")
    path = Path(next(iter(spec.submodule_search_locations))) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"reference_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, path.parent


@torch.no_grad()
def logits(module: ModuleType, merges: Path, shape: tuple, folder: Path) -> dict:
    torch.manual_seed(0)
    theirs = module.CLIP(*shape).eval()
    for p in theirs.parameters():
        if p.ndim == 1:  # gains and biases that start as ones and zeros would hide a mistake
            p.add_(0.1 * torch.randn_like(p))
    for layer in theirs.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
            layer.weight.uniform_(0.5, 1.5)
    weights, bundle = folder / "weights.safetensors", folder / "bundle"
    safetensors.torch.save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, weights)
    if armchair(["import", "openai-clip", str(weights), "--out", str(bundle), "--vocabulary", str(merges)]):
        sys.exit("the import failed")
    ours = load_ranker(bundle).model
    images, tokens = torch.rand(4, 3, 224, 224), torch.zeros(5, 77, dtype=torch.int64)
    for row, length in zip(tokens, (3, 8, 20, 50, 77), strict=True):
        row[0], row[1 : length - 1], row[length - 1] = 49406, torch.randint(49000, (length - 2,)), 49407
    mean, std = (torch.tensor(v)[:, None, None] for v in (ours.config.mean, ours.config.std))
    expected, _ = theirs((images - mean) / std, tokens)
    return {
        "largest difference": float((ours(images, tokens) - expected).abs().max()),
        "spread of the logits": float(expected.std()),
    }


def strings() -> list[str]:
    rng = random.Random(0)
    found = [p.text for p in prompts(200, split="train")]
    words = [
        "café",
        "naïve",
        "Straße",
        "ΑΣ",
        "привет",
        "東京",
        "한국어",
        "العربية",
        "हिन्दी",
        "ﬁne",
        "①②",
        "İstanbul",
        "ΣΑΣ",
    ]
    words += [
        "it's",
        "WE'LL",
        "don’t",
        "rock'n'roll",
        "&amp;",
        "&lt;b&gt;",
        "&amp;quot;",
        "â€œquoteâ€\x9d",
        "schÃ¶n",
        "😀",
    ]
    words += [
        "👩‍🚀",
        "❤️",
        "3.14",
        "1,000",
        "a_b",
        "x-ray",
        "e\u0301",
        "\u200b",
        "\u00a0",
        "\t",
        "\n",
        "#tag",
        "@you",
        "<|endoftext|>",
    ]
    while len(found) < 700:
        found.append(rng.choice(["", " ", "  "]).join(rng.choices(words, k=rng.randint(1, 8))))
    while len(found) < STRINGS:  # any characters at all
        spans = [
            (32, 127),
            (160, 0x250),
            (0x370, 0x600),
            (0x900, 0xA00),
            (0x3040, 0x3100),
            (0x4E00, 0x4F00),
            (0x1F300, 0x1F700),
        ]
        span = rng.choices(spans, weights=[6, 2, 2, 1, 1, 1, 1], k=rng.randint(1, 40))
        # Of a number that means nothing yet, two versions of Unicode may think differently.
        found.append("".join(c for s in span if unicodedata.category(c := chr(rng.randrange(*s))) != "Cn"))
    return found


def tokens(module: ModuleType, merges: Path) -> dict:
    theirs, ours = module.SimpleTokenizer(str(merges)), ClipTextTokenizer.from_merges(merges)
    differing = []
    for text in strings():
        ids = [ours.start_id, *theirs.encode(text), ours.end_id]
        ids = ids if len(ids) <= 77 else [*ids[:76], ours.end_id]
        if ours.encode([text], 77)[0].tolist() != [*ids, *[0] * (77 - len(ids))]:
            differing.append(text)
    return {"strings": STRINGS, "different": len(differing), "examples": differing[:5]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, home = reference("model")
    merges = home / "bpe_simple_vocab_16e6.txt.gz"
    results: dict = {"text": tokens(reference("simple_tokenizer")[0], merges)}
    print("text", results["text"], flush=True)
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = logits(model, merges, shape, Path(folder))
        print(name, results[name], flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
