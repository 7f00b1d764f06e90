"""`armchair export`: a bundle in a form that is smaller and opens sooner, and draws the same codes."""

from pathlib import Path

import torch

from armchair.bundle import find_bundle, read_bundle, write_bundle
from armchair.config import check_name, to_dict
from armchair.errors import RequestError
from armchair.sample.pipeline import Artist
from armchair.sample.weights import FORMATS, Exported, drawing_weights, exported, rounded


def export_bundle(model: str | Path, out: Path, format: str = "int8", *, force: bool = False) -> None:
    """Write the bundle `model`, named as for `load_artist`, to `out`, a directory or a `.zip`, its prior in `format`.

    int8, the only one: every matrix of the prior has eight bits, rounded as the engine rounds it, so that drawing in
    int8 gives the same codes bit for bit. The other parts stay as they are. Raises RequestError for another format, for
    a bundle that was exported already, and where `out` is there already, without `force`.
    """
    check_name("format", format, FORMATS)
    if out.exists() and not force:
        raise RequestError(f"{out} is there already: choose another name, or --force")
    bundle = read_bundle(find_bundle(str(model)))
    if exported(bundle) is not None:
        raise RequestError(f"{bundle.path}: this bundle was exported already; export the one that it came from")
    stored = {part: bundle.weights(part) for part in bundle.parts}
    prior = Artist(bundle, device=torch.device("cpu"), weights="fp32").prior
    half, eight = stored["prior"], rounded(drawing_weights(prior)).tensors
    # What is the same in 16 bits stays in them; folded vectors and scaled biases need their 32.
    stored["prior"] = {name: half[name] if _same(half.get(name), w) else w for name, w in eight.items()}
    origin = Exported(format=format, name=bundle.name, fingerprint=bundle.fingerprint)
    name = f"{bundle.name}-{format}"
    write_bundle(
        out,
        info={**bundle.info, "name": name, "exported": to_dict(origin)},
        card=_card(bundle.card, name, origin),
        text_tokenizer=bundle.text_tokenizer,
        weights=stored,
    )


def _same(stored: torch.Tensor | None, w: torch.Tensor) -> bool:
    return stored is not None and w.dtype == torch.float32 and torch.equal(stored.float(), w)


def _card(card: str, name: str, origin: Exported) -> str:
    """The card with the new name, and a line that says where the bundle is from."""
    title, _, rest = card.partition("\n")
    if not title.startswith("# "):
        rest = f"\n{card}"
    said = f"Exported from {origin.name} ({origin.fingerprint[:12]}): the prior has eight bits a weight."
    return f"# {name}\n\n{said} Figures are of {origin.name}.\n{rest}"
