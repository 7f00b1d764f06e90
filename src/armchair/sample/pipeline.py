"""From a bundle to pictures and back, on PIL images: draw, complete, draw again, encode, decode.

Legend: R resolution, S grid side, N = S*S codes a picture, K codebook size, T text length.

Needs torch, numpy, pillow, tokenizers and safetensors only: nothing of training or data is imported.
"""

import copy
import functools
import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from armchair.bundle import Bundle, bundled_names, find_bundle, read_bundle
from armchair.config import check_name, from_dict, to_dict
from armchair.errors import BundleError, RequestError, WorkError
from armchair.image.pixels import BrokenSample, read_image, stack, to_pil
from armchair.image.sheet import contact_sheet
from armchair.image.tokenizer import image_tokenizer_config, make_image_tokenizer
from armchair.prior.sequence import StreamShape, null_text
from armchair.prior.transformer import Prior, PriorConfig, PromptCache
from armchair.runtime import pick_device
from armchair.sample.cuda_engine import TYPES, CudaEngine, default_cuda_weights
from armchair.sample.engine import WEIGHTS, Engine, default_weights
from armchair.sample.generate import (
    AHEAD,
    FREE,
    MICRO_BATCH,
    Decoder,
    MicroBatch,
    candidate_uniforms,
    draw_codes,
    draw_micro_batch,
    read_prompts,
    several_threads,
)
from armchair.sample.next_token import Settings
from armchair.sample.png import output_paths, read_record, save_png
from armchair.sample.ranker import (
    BundleId,
    Ranker,
    check_prompt,
    in_micro_batches,
    load_part,
    load_ranker,
    open_ranker,
    several,
    square_of,
)
from armchair.sample.weights import DrawingWeights, exported, prior_of, read_rounded
from armchair.text.bpe import TextTokenizer

MAX_CANDIDATES = 4096
MAX_SEED = 2**63 - 1
UNDRAWN = (128, 128, 128)  # of a partial picture
SHEET_CELL = 256  # pixels, about, of a picture on a contact sheet

Rectangle = tuple[int, int, int, int]  # x, y, x2, y2 in pixels; x2 and y2 are exclusive


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a PNG carries: all that is needed to draw it again.

    `model` is how the bundle was asked for, None for the default. `rectangle` and `forced` (codes that were
    given, -1 elsewhere) are those of a completion; the kept pixels are in the PNG itself. `weights`: the form that the
    prior's were drawn with.
    """

    kind: str
    prompt: str
    seed: int
    candidate: int
    settings: Settings
    bundle: BundleId
    model: str | None
    codes: tuple[tuple[int, ...], ...]
    score: float | None = None
    ranker: BundleId | None = None  # whose score it is, where not the bundle's own ranker gave it
    rectangle: Rectangle | None = None
    forced: tuple[tuple[int, ...], ...] | None = None
    weights: str = "fp32"


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawing:
    """Pictures of one prompt, best first. A score is None where nothing ranks; codes are int64 (n, S, S)."""

    prompt: str
    images: list[Image.Image]
    scores: list[float | None]
    seeds: list[int]
    candidates: list[int]
    codes: np.ndarray
    settings: Settings
    bundle: BundleId
    model: str | None = None
    ranker: BundleId | None = None  # whose the scores are, where not the bundle's own
    rectangle: Rectangle | None = None
    forced: np.ndarray | None = None  # int64 (S, S)
    weights: str = "fp32"  # the form of the prior's weights, one of WEIGHTS

    def save(self, path: str | Path, *, grid: bool = False, force: bool = False) -> list[Path]:
        """Write a PNG for each picture, and with `grid` a contact sheet; the paths, the sheet's last.

        `path` is a name in .png, or a folder in which the prompt gives the name; `target_paths` has the
        rule. Raises RequestError, before anything is written, for a file that is there already (without
        `force`) or cannot be written, and WorkError on a full disk.
        """
        paths = target_paths(Path(path), self.prompt, len(self.images), grid)
        check_free(paths, force)
        for i, (image, place) in enumerate(zip(self.images, paths, strict=False)):
            save_png(image, place, to_dict(self.record(i)), force=force)
        if grid:
            columns = math.ceil(math.sqrt(len(self.images)))
            sheet = contact_sheet(self.images, None, columns, max(1, SHEET_CELL // self.images[0].width))
            save_png(sheet, paths[-1], {"kind": "grid", **self._what()}, force=force)
        return paths

    def record(self, i: int) -> Record:
        """The record of picture i."""
        return Record(
            kind="draw" if self.rectangle is None else "complete",
            prompt=self.prompt,
            seed=self.seeds[i],
            candidate=self.candidates[i],
            settings=self.settings,
            bundle=self.bundle,
            model=self.model,
            codes=self.codes[i].tolist(),
            score=self.scores[i],
            ranker=self.ranker,
            rectangle=self.rectangle,
            forced=None if self.forced is None else self.forced.tolist(),
            weights=self.weights,
        )

    def to_json(self, paths: Sequence[Path] | None = None) -> dict[str, Any]:
        """The drawing as JSON data; `paths` are what `save` gave, without them each path is null."""
        images = [
            {
                "path": str(paths[i]) if paths else None,
                "candidate": self.candidates[i],
                "seed": self.seeds[i],
                "score": self.scores[i],
                "codes": self.codes[i].tolist(),
            }
            for i in range(len(self.images))
        ]
        return {**self._what(), "images": images}

    def _what(self) -> dict[str, Any]:
        ranker = {} if self.ranker is None else {"ranker": to_dict(self.ranker)}
        return {
            "prompt": self.prompt,
            "bundle": to_dict(self.bundle),
            **ranker,
            "settings": {**to_dict(self.settings), "weights": self.weights},
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What is to be drawn, checked. `forced` holds codes (S, S) that are given, FREE elsewhere; `original` is uint8
    (R, R, 3), whose pixels stay outside the rectangle."""

    prompt: str
    candidates: list[int]
    keep: int
    seed: int
    settings: Settings
    rectangle: Rectangle | None = None
    forced: np.ndarray | None = None
    original: np.ndarray | None = None


class Artist:
    """A bundle ready to draw. Weights are read from 16 bits, or the prior's from eight where it was exported so.

    `weights` has the form that the prior draws with.

    The same bundle, prompt, settings, weights and seed give the same codes and pixels on one machine, however many
    candidates are drawn: candidate c depends on (seed, c) and on nothing else.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: torch.device,
        model: str | None = None,
        ranker: Ranker | None = None,
        weights: str | None = None,
    ) -> None:
        """`ranker` takes the place of the bundle's own, or of none; `weights`: as `load_artist`.

        Raises BundleError, naming the part, for a bundle that lacks one or whose parts do not fit.
        """
        info, where = bundle.info, f"{bundle.path}: bundle.json"
        if bundle.parts == ("ranker",):
            raise BundleError(f"{bundle.path}: this bundle only ranks; give it as the ranker of one that draws")
        try:
            recipe = info["recipe"]
            image_config = image_tokenizer_config(recipe["image_tokenizer"], "recipe.image_tokenizer")
            prior_config = from_dict(PriorConfig, recipe["prior"], "recipe.prior")
            drawing = recipe["drawing"]  # an older bundle lacks the settings that came after it
            defaults = {f.name: drawing[f.name] for f in fields(Settings) if f.name in drawing}
            self.settings = self.bundle_settings = from_dict(Settings, defaults, "recipe.drawing")
            self.shape = shape = StreamShape(
                text_vocab_size=operator.index(info["text_vocab_size"]),
                text_length=operator.index(recipe["text_tokenizer"]["length"]),
                codebook_size=image_config.codebook_size,
                grid=image_config.grid,
            )
        except (KeyError, TypeError) as error:
            raise BundleError(f"{where} lacks what drawing needs, or has it wrong: {error}") from None
        except RequestError as error:
            raise BundleError(f"{where}: {error}") from None
        if bundle.text_tokenizer is None:
            raise BundleError(f"{bundle.path}: no text_tokenizer.json in this bundle")
        self.text_tokenizer = TextTokenizer.from_json(bundle.text_tokenizer)
        if self.text_tokenizer.vocab_size != shape.text_vocab_size:
            raise BundleError(
                f"{bundle.path}: text_tokenizer.json has {self.text_tokenizer.vocab_size} entries, "
                f"bundle.json says {shape.text_vocab_size}"
            )
        self.bundle, self.model, self.device = bundle, model, device
        self.image_tokenizer = load_part(
            lambda: make_image_tokenizer(image_config), bundle, "image_tokenizer", device
        )
        self._prior_config = prior_config
        self._eight_bits = None if exported(bundle) is None else _read_eight_bits(bundle, prior_config, shape)
        if ranker is None and "ranker" in bundle.parts:
            ranker = open_ranker(bundle, device, self.text_tokenizer)
        self.ranker = ranker
        on_cpu = device.type == "cpu"
        self.weights = weights or (default_weights(prior_config) if on_cpu else default_cuda_weights(device))
        self._decoders: dict[str, Decoder] = {}
        self.decoder(self.weights)

    def with_settings(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance: float | None = None,
        naturalness: float | None = None,
    ) -> "Artist":
        """The same artist, which draws with these where it is asked for none; None is its own still. Raises as `draw`.

        `bundle_settings` stay what the bundle has.
        """
        other = copy.copy(self)
        other.settings = self._settings(temperature, top_k, top_p, min_p, guidance, naturalness)
        return other

    def decoder(self, weights: str | None = None) -> Decoder:
        """What draws with the prior's weights in that form, one of WEIGHTS; None: in this artist's own.

        Raises RequestError for an unknown form, or for one that is not for this artist's device.
        """
        weights = weights or self.weights
        check_name("weights", weights, WEIGHTS)
        forms = {"cpu": WEIGHTS, "cuda": tuple(TYPES)}.get(self.device.type, ("fp32",))
        if weights not in forms:
            wanted = " or ".join(forms)
            raise RequestError(f"weights {weights!r} are not for {self.device.type}; take {wanted}, or leave them out")
        if weights not in self._decoders:
            self._decoders[weights] = self._made(weights)
        return self._decoders[weights]

    def _made(self, weights: str) -> Decoder:
        if self.device.type == "cpu":
            return Engine(self._eight_bits or self.prior, weights)
        return CudaEngine(self.prior, weights) if self.device.type == "cuda" else self.prior

    @functools.cached_property
    def prior(self) -> Prior:
        """The prior in 32 bits, its codes' vectors written out. Of eight bits it is made when it is first asked for."""
        if self._eight_bits is not None:
            return prior_of(self._eight_bits).to(self.device)
        codebook = self.image_tokenizer.code_vectors
        make = functools.partial(Prior, self._prior_config, self.shape, codebook)
        return load_part(make, self.bundle, "prior", self.device).folded()

    @property
    def id(self) -> BundleId:
        return BundleId(name=self.bundle.name, fingerprint=self.bundle.fingerprint)

    @property
    def resolution(self) -> int:
        """R, the side of a picture in pixels."""
        return self.image_tokenizer.resolution

    @property
    def grid(self) -> int:
        """S, the side of a picture in codes."""
        return self.image_tokenizer.grid

    def draw(
        self,
        prompt: str,
        *,
        candidates: int = 4,
        keep: int | None = None,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance: float | None = None,
        naturalness: float | None = None,
        halve: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Drawing:
        """Draw `candidates` (1 to 4096) pictures of a prompt and keep the best `keep` (0 or None: all).

        The ranker says which are best, and they come best first (paper, section 2.6). Without a ranker the first ones
        are kept, and only they are drawn. A setting of None is the bundle's own; `Settings` has the ranges. With
        `halve` the ranker looks at upper halves too, and only the better half of the candidates (`keep` at least) is
        finished: each as it is without. `progress` is told now and then how many candidates are drawn, and of how many.
        Raises RequestError for anything out of range, and for `halve` where there is no ranker.
        """
        if halve:
            self._check_ranks()
        plan = self.plan(
            prompt,
            candidates=candidates,
            keep=keep,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance=guidance,
            naturalness=naturalness,
        )
        forced = None
        if halve:
            plan, forced, progress = self._halved(plan, keep or 0, progress)
        return self._drawing(plan, *self._draw_pictures(plan, forced, progress))

    def draw_each(self, prompts: Sequence[str], *, seed: int = 0, first: int = 0) -> list[Image.Image]:
        """One picture a prompt, drawn together; that of prompt i is what `draw` has as its candidate `first` + i.

        Raises as `draw`.
        """
        for prompt in prompts:
            check_prompt(prompt)
        tokens = torch.cat([self._tokens(prompt) for prompt in prompts])
        candidates = range(_whole("first", first, 0, MAX_SEED), first + len(prompts))
        uniforms = candidate_uniforms(_whole("seed", seed, 0, MAX_SEED), candidates, self.shape.image_length)
        decoder, rows = self.decoder(), range(len(prompts))

        codes = draw_codes(decoder, tokens, rows, uniforms, self.settings)
        return self._decode(codes.cpu().numpy())

    def draw_stream(
        self,
        prompt: str,
        *,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance: float | None = None,
    ) -> Iterator[Image.Image | Drawing]:
        """Draw candidate 0 and show it grow: S partial pictures, one a row of codes, then the Drawing.

        What is not drawn yet is grey; the last partial picture is the finished one. Raises as `draw`, now and
        not at the first picture.
        """
        check_prompt(prompt)
        seed = _whole("seed", seed, 0, MAX_SEED)
        return self._stream(prompt, seed, self._settings(temperature, top_k, top_p, min_p, guidance))

    def complete(
        self,
        image: Image.Image,
        prompt: str,
        *,
        redraw: tuple[int, ...] | None = None,
        keep_top: float | None = None,
        candidates: int = 4,
        keep: int | None = None,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance: float | None = None,
        naturalness: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Drawing:
        """Redraw a part of a picture (paper, figure 2c) and keep every pixel outside of it exactly.

        `redraw` is a rectangle (x, y) or (x, y, x2, y2) in pixels of the R x R picture, down to the bottom
        right corner unless x2 and y2 (exclusive) are given. `keep_top` in [0, 1) is the share of the height
        that is kept instead; by default it is 0.5. An image of another size is cut square and resized first.
        The codes of all cells that meet the rectangle are drawn, the others given. Raises as `draw`.
        """
        check_prompt(prompt)
        plan = self.plan(
            prompt,
            image=image,
            redraw=_rectangle(redraw, keep_top, self.resolution),
            candidates=candidates,
            keep=keep,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance=guidance,
            naturalness=naturalness,
        )
        return self._drawing(plan, *self._draw_pictures(plan, plan.forced, progress))

    def redraw(self, path: str | Path) -> Drawing:
        """Draw the picture in a PNG once more from its record, bit for bit.

        Raises RequestError where the PNG has no record or was drawn with another bundle, and WorkError where
        this machine draws other codes than the recorded ones.
        """
        path = Path(path)
        record = parse_record(path)
        if record.bundle != self.id:
            raise RequestError(
                f"{path} was drawn with bundle {record.bundle.name} ({record.bundle.fingerprint[:12]}), and "
                f"{self.bundle.path} is {self.id.name} ({self.id.fingerprint[:12]}): give the right one"
            )
        recorded = _grid_of(path, "codes", record.codes, self.grid, 0, self.image_tokenizer.codebook_size)
        forced = original = None
        if record.rectangle is not None and record.forced is not None:
            forced = _grid_of(
                path, "forced", record.forced, self.grid, FREE, self.image_tokenizer.codebook_size
            )
            _rectangle(record.rectangle, None, self.resolution)
            original = _read_picture(path)
            if original.shape[:2] != (self.resolution, self.resolution):
                raise RequestError(
                    f"{path}: the picture was resized since, its kept pixels are lost; "
                    f"expected {self.resolution} x {self.resolution}"
                )
        chosen = [record.candidate]
        codes = self._draw(record.prompt, chosen, record.seed, record.settings, forced, weights=record.weights)
        if different := int((codes[0] != recorded).sum()):
            raise WorkError(
                f"{path}: {different} of {recorded.size} codes come out differently here; it was drawn on "
                "another device, or with another version of PyTorch"
            )
        plan = Plan(
            prompt=record.prompt,
            candidates=chosen,
            keep=1,
            seed=record.seed,
            settings=record.settings,
            rectangle=record.rectangle,
            forced=forced,
            original=original,
        )
        drawing = self._drawing(plan, codes, rank=False)  # the recorded score stays, so that the same file comes out
        return replace(
            drawing, model=record.model, scores=[record.score], ranker=record.ranker, weights=record.weights
        )

    def rank(self, images: Image.Image | Sequence[Image.Image], prompt: str) -> list[float]:
        """Scores of images for a prompt, as `Ranker.rank`. Raises RequestError where there is no ranker, too."""
        return self._check_ranks().rank(images, prompt)

    @torch.inference_mode()
    def likelihood(self, image: Image.Image, prompt: str) -> float:
        """Bits per image token given the caption, -log2 p(codes | prompt) / N; lower is likelier."""
        check_prompt(prompt)
        codes = torch.from_numpy(self.encode(image)).to(self.device).flatten(1)
        _, logits = self.prior(self._tokens(prompt), codes)
        return float(F.cross_entropy(logits[0].float(), codes[0])) / math.log(2)

    def encode(self, images: Image.Image | Sequence[Image.Image]) -> np.ndarray:
        """Images of any size, cut square and resized to R -> codes, int64 (B, S, S).

        Raises RequestError for none, or for something that is not an image.
        """
        return self._encode([square_of(image, self.resolution) for image in several(images)])

    def decode(self, codes: np.ndarray | Sequence[Any]) -> list[Image.Image]:
        """Codes (B, S, S), integers in [0, K) -> B RGB images of R x R. Raises RequestError for others."""
        try:
            codes = np.asarray(codes)
        except ValueError:
            raise RequestError("codes: expected a regular array, got rows of different lengths") from None
        s, k = self.grid, self.image_tokenizer.codebook_size
        if codes.ndim != 3 or codes.shape[1:] != (s, s) or not len(codes):
            raise RequestError(f"codes: expected the shape (B, {s}, {s}), got {codes.shape}")
        if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= k:
            raise RequestError(f"codes: expected whole numbers from 0 to {k - 1}")
        return self._decode(codes.astype(np.int64))

    # The steps of drawing one by one, for whoever draws for several at once.

    def plan(
        self,
        prompt: str,
        *,
        image: Image.Image | None = None,
        redraw: Rectangle | None = None,
        candidates: int = 4,
        keep: int | None = None,
        seed: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance: float | None = None,
        naturalness: float | None = None,
    ) -> Plan:
        """What `draw` would draw, or with an image and a rectangle `complete`. Raises as these.

        An image can be completed with an empty prompt too: as the model goes on where it is told nothing. Nothing is
        ranked then.
        """
        if prompt or image is None:
            check_prompt(prompt)
        seed = _whole("seed", seed, 0, MAX_SEED)
        chosen, keep = self._candidates(candidates, keep)
        settings = self._settings(temperature, top_k, top_p, min_p, guidance, naturalness)
        if (image is None) != (redraw is None):
            raise RequestError("to complete a picture, give both the image and the rectangle to redraw")
        plan = Plan(prompt=prompt, candidates=chosen, keep=keep, seed=seed, settings=settings)
        if image is None or redraw is None:
            return plan
        x, y, x2, y2 = redraw = _rectangle(redraw, None, self.resolution)
        original = square_of(image, self.resolution)
        forced = self._encode([original])[0]
        cell = self.resolution // self.grid
        forced[y // cell : math.ceil(y2 / cell), x // cell : math.ceil(x2 / cell)] = FREE
        return replace(plan, rectangle=redraw, forced=forced, original=original)

    def reads(self, prompt: str) -> tuple[str, int]:
        """What of a prompt the model reads, lower-cased and cut as its text tokenizer has it, and how many tokens."""
        (row,) = self.text_tokenizer.encode([prompt], self.shape.text_length, warn=False)
        return self.text_tokenizer.decode(row), int((row != self.text_tokenizer.pad_id).sum())

    def read_prompt(self, prompt: str) -> PromptCache:
        """The state of a prompt that was read, of one row. That it was cut, `reads` tells."""
        return read_prompts(self.decoder(), self._tokens(prompt, warn=False))

    @functools.cached_property
    def empty_prompt(self) -> PromptCache:
        """That of no prompt, which guidance pushes away from."""
        return read_prompts(self.decoder(), null_text(1, self.shape, self.device))

    def pictures(
        self, plans: Sequence[Plan], codes: np.ndarray, rows: Sequence[int] | None = None
    ) -> list[Image.Image]:
        """Picture i of plan i, from codes (n, S, S), of which the first `rows[i]` rows are drawn and the rest is grey.

        A picture's bytes do not depend on which others are made with it. n may be 0.
        """
        return self._finish(plans, self._decode(codes), rows) if len(codes) else []

    def _finish(
        self, plans: Sequence[Plan], images: list[Image.Image], rows: Sequence[int] | None = None
    ) -> list[Image.Image]:
        """What `pictures` does with decoded ones."""
        for i, (image, plan) in enumerate(zip(images, plans, strict=True)):
            if rows is not None and rows[i] < self.grid:
                image.paste(UNDRAWN, (0, rows[i] * (self.resolution // self.grid), self.resolution, self.resolution))
            if plan.rectangle is not None and plan.original is not None:
                images[i] = _keep_outside(image, plan.original, plan.rectangle)
        return images

    def scores(
        self, plans: Sequence[Plan], images: Sequence[Image.Image], codes: np.ndarray
    ) -> list[float | None]:
        """How good each picture, of codes (n, S, S), is for the prompt of its plan; None where nothing ranks.

        The ranker's score, and `naturalness` times what `likelihoods` says. By Bayes' rule a picture is likely for a
        caption as the caption is for it, which the ranker stands for, and as it is by itself, which the prior knows
        without a caption (a noisy channel; for captions so in Yee et al., 2019): a ranker has seen well-made pictures
        only, and does not mind what is none.
        """
        told = [i for i, plan in enumerate(plans) if plan.prompt]
        if self.ranker is None or not told:
            return [None] * len(images)
        found = self.ranker.score([images[i] for i in told], [plans[i].prompt for i in told])
        scores = dict(zip(told, found, strict=True))
        weighed = [i for i in told if plans[i].settings.naturalness]
        for i, likelihood in zip(weighed, self.likelihoods(codes[weighed]), strict=True):
            scores[i] += plans[i].settings.naturalness * likelihood
        return [scores.get(i) for i in range(len(images))]

    @torch.inference_mode()
    def likelihoods(self, codes: np.ndarray) -> list[float]:
        """log2 p(codes) / N without a caption, of pictures' codes (n, S, S): minus bits a code. n may be 0."""
        if not len(codes):
            return []

        def of(chunk: Tensor) -> Tensor:
            chunk = chunk.to(self.device)
            logits = self.prior(null_text(len(chunk), self.shape, self.device), chunk)[1].float()
            return -F.cross_entropy(logits.transpose(1, 2), chunk, reduction="none").mean(1).cpu() / math.log(2)

        return in_micro_batches(of, torch.from_numpy(codes).flatten(1), self.device).tolist()

    def drawing(
        self,
        plan: Plan,
        codes: np.ndarray,
        images: Sequence[Image.Image],
        scores: Sequence[float | None],
        candidates: Sequence[int] | None = None,
    ) -> Drawing:
        """The best `keep` of pictures, best first; `candidates` says which these are, all of the plan's by default."""
        candidates = plan.candidates if candidates is None else candidates
        order = sorted(range(len(images)), key=lambda i: -(scores[i] or 0.0))  # stable: of equal ones the first drawn
        order = order[: plan.keep]
        return Drawing(
            prompt=plan.prompt,
            images=[images[i] for i in order],
            scores=[scores[i] for i in order],
            seeds=[plan.seed] * len(order),
            candidates=[candidates[i] for i in order],
            codes=codes[order],
            settings=plan.settings,
            bundle=self.id,
            model=self.model,
            ranker=None if self.ranker is None or self.ranker.id == self.id else self.ranker.id,
            rectangle=plan.rectangle,
            forced=plan.forced,
            weights=self.weights,
        )

    def _candidates(self, candidates: int, keep: int | None) -> tuple[list[int], int]:
        """Which candidates to draw, and how many of them to keep."""
        count = _whole("candidates", candidates, 1, MAX_CANDIDATES)
        keep = _whole("keep", keep or 0, 0, count) or count
        return list(range(keep if self.ranker is None else count)), keep

    def _check_ranks(self) -> Ranker:
        if self.ranker is None:
            raise RequestError(
                f"bundle {self.bundle.name} has no ranker, so it cannot rank pictures; name another bundle's"
            )
        return self.ranker

    def _settings(
        self,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        guidance: float | None,
        naturalness: float | None = None,
    ) -> Settings:
        asked = dict(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            guidance=guidance,
            naturalness=naturalness,
        )
        given = {name: value for name, value in asked.items() if value is not None}
        return from_dict(Settings, {**to_dict(self.settings), **given})

    def _tokens(self, prompt: str, warn: bool = True) -> Tensor:
        tokens = self.text_tokenizer.encode([prompt], self.shape.text_length, warn=warn)
        return torch.from_numpy(tokens).to(self.device)

    def _draw(
        self,
        prompt: str,
        candidates: list[int],
        seed: int,
        settings: Settings,
        forced: np.ndarray | None = None,
        progress: Callable[[int, int], None] | None = None,
        weights: str | None = None,
        until: int | None = None,
    ) -> np.ndarray:
        """Codes (n, S, S) of candidates; `forced` holds given ones, (S, S) for all or (n, S, S)."""
        uniforms = candidate_uniforms(seed, candidates, self.shape.image_length)
        given = None if forced is None else torch.from_numpy(forced).flatten(-2).expand(uniforms.shape)
        rows = [0] * len(candidates)
        decoder = self.decoder(weights)
        tokens = self._tokens(prompt)
        codes = draw_codes(decoder, tokens, rows, uniforms, settings, given, progress, until)
        return codes.cpu().numpy()

    def _draw_pictures(
        self, plan: Plan, forced: np.ndarray | None, progress: Callable[[int, int], None] | None
    ) -> tuple[np.ndarray, list[Image.Image]]:
        """The codes of a plan's candidates, `_draw`, and what they decode to."""
        codes = self._draw(plan.prompt, plan.candidates, plan.seed, plan.settings, forced, progress)
        return codes, self._decode(codes)

    def _halved(
        self, plan: Plan, keep: int, progress: Callable[[int, int], None] | None
    ) -> tuple[Plan, np.ndarray, Callable[[int, int], None] | None]:
        """The plan with the candidates whose upper halves the ranker finds better, half of them or `keep`; the codes
        of these halves, FREE below; and whom to tell of the rest of the work.

        The halves are all that is held of the others, and what is kept of them is read again at once, so that memory
        is bounded however many there are.
        """
        prompt, candidates, seed, settings = plan.prompt, plan.candidates, plan.seed, plan.settings
        count, rows = len(candidates), math.ceil(self.grid / 2)
        left = max(keep, math.ceil(count / 2))
        work = count + left  # halves

        def told(before: int) -> Callable[[int, int], None] | None:
            return progress and (lambda done, _: progress((before + done) * count // work, count))

        upper = self._draw(prompt, candidates, seed, settings, progress=told(0), until=rows * self.grid)
        scores = self._check_ranks().rank(self._mirrored(upper, rows), prompt)
        better = sorted(sorted(range(count), key=lambda i: -scores[i])[:left])
        forced = upper[better]
        forced[:, rows:] = FREE
        return replace(plan, candidates=[candidates[i] for i in better]), forced, told(count)

    def _mirrored(self, codes: np.ndarray, rows: int) -> list[Image.Image]:
        """Pictures of which the first `rows` rows of codes are drawn, half or more: mirrored, they fill the rest.

        Of what may stand in for a lower half, this let the ranker foresee best what it says of the whole.
        """
        s, cut = self.grid, rows * (self.resolution // self.grid)
        codes = codes.copy()
        codes[:, rows:] = codes[:, 2 * rows - s : rows][:, ::-1]
        images = []
        for image in self._decode(codes):
            pixels = np.array(image)
            pixels[cut:] = pixels[2 * cut - self.resolution : cut][::-1]
            images.append(Image.fromarray(pixels))
        return images

    def _stream(self, prompt: str, seed: int, settings: Settings) -> Iterator[Image.Image | Drawing]:
        shape, decoder = self.shape, self.decoder()
        rows = torch.zeros(1 if decoder.independent_rows else MICRO_BATCH, dtype=torch.int64)
        prompts = read_prompts(decoder, self._tokens(prompt)).rows(rows)
        null = read_prompts(decoder, null_text(1, shape, self.device))
        uniforms = candidate_uniforms(seed, [0], shape.image_length)[rows].to(self.device)
        forced = torch.full_like(uniforms, FREE, dtype=torch.int64)
        cell = self.resolution // self.grid
        batch = MicroBatch(decoder, prompts, null, uniforms, settings, forced, AHEAD if len(rows) == 1 else 1)
        for finished, drawn in enumerate(draw_micro_batch(decoder, batch, several_threads(decoder)), start=1):
            codes = drawn[:1].unflatten(1, (self.grid, self.grid))
            if finished < self.grid:
                (partial,) = to_pil(self._pixels(codes))
                partial.paste(UNDRAWN, (0, finished * cell, self.resolution, self.resolution))
                yield partial
        plan = Plan(prompt=prompt, candidates=[0], keep=1, seed=seed, settings=settings)
        drawing = self._drawing(plan, codes.cpu().numpy())
        yield drawing.images[0].copy()
        yield drawing

    def _drawing(
        self, plan: Plan, codes: np.ndarray, images: list[Image.Image] | None = None, rank: bool = True
    ) -> Drawing:
        """Of codes, and what they decode to where that is done already."""
        plans = [plan] * len(codes)
        images = self.pictures(plans, codes) if images is None else self._finish(plans, images)
        scores = self.scores(plans, images, codes) if rank else [None] * len(images)
        return self.drawing(plan, codes, images, scores)

    @torch.inference_mode()
    def _encode(self, squares: list[np.ndarray]) -> np.ndarray:
        encode = self.image_tokenizer.encode
        return in_micro_batches(lambda x: encode(x.to(self.device)).cpu(), stack(squares), self.device).numpy()

    def _decode(self, codes: np.ndarray) -> list[Image.Image]:
        return to_pil(in_micro_batches(self._pixels, torch.from_numpy(codes), self.device))

    @torch.inference_mode()
    def _pixels(self, codes: Tensor) -> Tensor:
        return self.image_tokenizer.decode(codes.to(self.device)).cpu()


def load_artist(
    model: str | Path | None = None,
    device: str = "auto",
    ranker: str | Path | None = None,
    weights: str | None = None,
) -> Artist:
    """Open a bundle for drawing: a directory, a zip, a bundled name, a hub id, or None for the default.

    `device` is `auto`, `cpu` or `cuda`. `ranker` names another bundle whose ranker shall judge. `weights` is the form
    that the prior's are drawn with: `int8`, for a CPU only and the default there, `bf16`, the default on a GPU that has
    it, or `fp32`. Raises BundleError for a bundle that is missing or not whole, and RequestError for a device that is
    not here or weights that are not for it.
    """
    asked = None if model is None else str(model)
    chosen = pick_device(device)
    judge = None if ranker is None else load_ranker(ranker, device)
    return Artist(read_bundle(find_bundle(asked)), device=chosen, model=asked, ranker=judge, weights=weights)


def redraw_png(path: str | Path, device: str = "auto", model: str | Path | None = None) -> Drawing:
    """The picture of a PNG once more, from its metadata alone; `model` says where its bundle is.

    Raises as `load_artist` and `Artist.redraw`.
    """
    record = parse_record(Path(path))
    asked = record.model if model is None else model
    if record.weights == "int8" and device == "auto":
        device = "cpu"  # where alone such weights draw
    try:
        artist = load_artist(asked, device, weights=record.weights)
    except BundleError:
        if model is not None or record.bundle.name not in bundled_names():
            raise
        artist = load_artist(record.bundle.name, device, weights=record.weights)
    return artist.redraw(path)


def target_paths(out: Path, name: str, count: int, grid: bool = False) -> list[Path]:
    """Where `count` pictures go, as `output_paths` has it, and with `grid` a sheet, NAME-grid.png."""
    paths = output_paths(out, name, count)
    if grid:
        single = output_paths(out, name, 1)[0]
        paths.append(single.with_name(f"{single.stem}-grid{single.suffix}"))
    return paths


def check_free(paths: Sequence[Path], force: bool) -> None:
    """Raises RequestError where pictures would meet in one file, overwrite one, or cannot be written."""
    taken: set[Path] = set()
    for path in paths:
        if path in taken:
            raise RequestError(
                f"two pictures would be written to {path}; draw them one at a time, or change --out"
            )
        taken.add(path)
        if os.path.lexists(path) and (path.is_dir() or not force):
            raise RequestError(f"{path} is there already: choose another name, or --force")
        folder = path.parent
        while not os.path.lexists(folder) and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise RequestError(f"cannot write {path}: {folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RequestError(f"cannot write {path}: no permission to write in {folder}")


def _read_eight_bits(bundle: Bundle, config: PriorConfig, shape: StreamShape) -> DrawingWeights:
    """The prior of a bundle that was exported in eight bits; of a directory its file is mapped."""
    stored = bundle.weights("prior")
    try:
        return read_rounded(stored, config, shape)
    except RequestError as error:
        raise BundleError(f"{bundle.path}: prior.safetensors does not fit the bundle's recipe: {error}") from None


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= operator.index(value) <= high:
        raise RequestError(f"{name}: expected a whole number from {low} to {high}, got {value!r}")
    return operator.index(value)


def _rectangle(redraw: tuple[int, ...] | None, keep_top: float | None, resolution: int) -> Rectangle:
    if redraw is None:
        share = 0.5 if keep_top is None else keep_top
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise RequestError(
                f"keep_top: expected a share of the height from 0 to less than 1, got {share!r}"
            )
        return 0, min(round(share * resolution), resolution - 1), resolution, resolution
    if keep_top is not None:
        raise RequestError("give either keep_top or redraw, not both")
    if not isinstance(redraw, (tuple, list)) or len(redraw) not in (2, 4):
        raise RequestError(f"redraw: expected (x, y) or (x, y, x2, y2) in pixels, got {redraw!r}")
    x, y = (_whole(f"redraw {name}", v, 0, resolution - 1) for name, v in zip("xy", redraw, strict=False))
    x2, y2 = redraw[2:] or (resolution, resolution)
    return x, y, _whole("redraw x2", x2, x + 1, resolution), _whole("redraw y2", y2, y + 1, resolution)


def _keep_outside(drawn: Image.Image, original: np.ndarray, rectangle: Rectangle) -> Image.Image:
    x, y, x2, y2 = rectangle
    pixels = original.copy()
    pixels[y:y2, x:x2] = np.asarray(drawn)[y:y2, x:x2]
    return Image.fromarray(pixels)


def parse_record(path: Path) -> Record:
    """What a PNG of a single picture carries. Raises RequestError as `read_record`, and where it is damaged."""
    data = read_record(path)
    if data.get("kind") not in ("draw", "complete"):
        raise RequestError(f"{path}: only single pictures can be drawn again, this is a {data.get('kind')!r}")
    try:
        record = from_dict(Record, data)
        if record.prompt or record.kind == "draw":
            check_prompt(record.prompt)
        _whole("seed", record.seed, 0, MAX_SEED)
        _whole("candidate", record.candidate, 0, MAX_CANDIDATES - 1)
    except RequestError as error:
        raise RequestError(
            f"{path}: its armchair metadata is not what this version writes: {error}"
        ) from None
    if (record.kind == "complete") != (record.rectangle is not None and record.forced is not None):
        raise RequestError(
            f"{path}: its armchair metadata is damaged: a completion has a rectangle and forced codes"
        )
    return record


def _grid_of(
    path: Path, name: str, rows: tuple[tuple[int, ...], ...], side: int, low: int, codebook_size: int
) -> np.ndarray:
    if [len(row) for row in rows] != [side] * side:
        raise RequestError(f"{path}: its armchair metadata is damaged: expected {side} x {side} {name}")
    if not all(low <= code < codebook_size for row in rows for code in row):
        raise RequestError(
            f"{path}: its armchair metadata is damaged: expected {name} of {low} to {codebook_size - 1}"
        )
    return np.array(rows, dtype=np.int64)


def _read_picture(path: Path) -> np.ndarray:
    try:
        return read_image(path)
    except BrokenSample as broken:
        raise RequestError(f"{path}: {broken.cause}") from None
