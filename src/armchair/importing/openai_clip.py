"""A released CLIP, OpenAI's or one of OpenCLIP's, as a bundle that ranks."""

from pathlib import Path

import torch

from armchair import __version__
from armchair.bundle import write_bundle
from armchair.clip.block import ACTIVATIONS
from armchair.clip.model import CLIP
from armchair.clip.released import config_of, renamed
from armchair.clip.weight_file import read_weights
from armchair.config import check_name, to_dict
from armchair.errors import RequestError
from armchair.text.clip_bpe import ClipTextTokenizer

VOCABULARIES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "merges.txt")


def import_openai_clip(
    weights: Path, out: Path, *, vocabulary: Path | None = None, activation: str = "quick_gelu", force: bool = False
) -> CLIP:
    """Write the bundle; the model that is in it.

    weights: a state dict in `.safetensors`, `.bin` or `.pt`, or one of OpenAI's TorchScript files. vocabulary: the list
    of merges that comes with the models' code, looked for beside the weights where it is not given. activation:
    `quick_gelu` as OpenAI's models have, or `gelu` as most of OpenCLIP's; the weights do not tell. Raises RequestError
    for files that are not these, and where `out` is there already, without `force`.
    """
    check_name("activation", activation, ACTIVATIONS)
    if out.exists() and not force:
        raise RequestError(f"{out} is there already: choose another name, or --force")
    if not weights.is_file():
        raise RequestError(f"no weights at {weights}: no such file")
    tokenizer = ClipTextTokenizer.from_merges(vocabulary or _vocabulary_beside(weights))
    state = read_weights(weights)
    config, shape = config_of(state, activation)
    if shape.vocab_size != tokenizer.vocab_size:
        raise RequestError(
            f"{weights} is of a model with {shape.vocab_size} text tokens, the vocabulary makes {tokenizer.vocab_size}"
        )
    with torch.random.fork_rng(devices=[]):
        model = CLIP(config, shape).eval()
    try:
        model.load_state_dict(renamed(state))
    except RuntimeError as error:
        raise RequestError(
            f"{weights}: not all of a released CLIP: {str(error).splitlines()[1].strip()[:200]}"
        ) from None
    kind = "a vision transformer" if config.image.is_transformer else "a ResNet"
    size, name = config.image.resolution, out.stem if out.suffix == ".zip" else out.name
    info = {
        "name": name,
        "ranker": to_dict(config),
        "text_length": shape.length,
        "versions": {"armchair": __version__, "torch": str(torch.__version__)},
    }
    card = (
        f"# {name}\n\nA ranker only: CLIP with {kind} for pictures of {size} x {size} pixels, imported from "
        f"`{weights.name}`. It scores pictures for `armchair draw --ranker`; it draws nothing.\n\n"
        "## Licence\n\nThat of the file it was imported from.\n"
    )
    parts = {"ranker": model.state_dict()}
    write_bundle(out, info=info, card=card, text_tokenizer=tokenizer.to_json(), weights=parts)
    return model


def _vocabulary_beside(weights: Path) -> Path:
    for name in VOCABULARIES:
        if (found := weights.with_name(name)).is_file():
            return found
    raise RequestError(
        f"no {VOCABULARIES[0]} beside {weights}: it comes with the models' code, name it with --vocabulary"
    )
