"""A whole recipe, stage after stage, in one run folder, to a bundle.

    RUN/recipe.json            the recipe as it was resolved, written before step 1
        init.json              the bundle that it started from, where it did
        log.jsonl  sheets/  tensorboard/
        text_tokenizer.json
        autoencoder/           checkpoints of stage 1's start, where the recipe has one
        image_tokenizer/       checkpoints of stage 1
        decoder/               checkpoints of the decoder's own training, where the recipe has one
        codes/                 token caches of stage 2
        prior/                 checkpoints of stage 2
        bundle/                what the run is for
"""

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

import armchair
from armchair.bundle import Bundle, write_bundle
from armchair.card import render_card
from armchair.clip.captioner import CaptionerConfig
from armchair.clip.model import CLIP, TextShape
from armchair.config import from_dict, to_dict
from armchair.data.loader import all_captions, split
from armchair.data.sources import Source, open_source
from armchair.data.token_cache import TokenCache, build_cache, open_cache
from armchair.errors import RequestError, WorkError
from armchair.image.autoencoder import Autoencoder
from armchair.image.dvae import DVAE
from armchair.image.network import ImageTokenizer
from armchair.image.tokenizer import make_image_tokenizer
from armchair.prior.sequence import StreamShape
from armchair.prior.transformer import Prior
from armchair.runtime import autocast, generator, stream_seed
from armchair.sample.weights import exported
from armchair.text.bpe import TextTokenizer
from armchair.train.checkpoint import checkpoints, newest_step
from armchair.train.image_tokenizer import (
    AutoencoderStage,
    DecoderStage,
    ImageTokenizerStage,
    check_codes,
    code_figures,
    fixed_images,
)
from armchair.train.loop import Stage, fit
from armchair.train.prior import PriorStage
from armchair.train.ranker import RankerStage, fixed_pairs
from armchair.train.recipe import FitConfig, Recipe
from armchair.train.report import Report

logger = logging.getLogger(__name__)

TOKENIZERS = ("text_tokenizer", "image_tokenizer")
# The parts of a prior that speak of a tokenizer's entries: with another tokenizer they start anew.
PRIOR_TABLES = {
    "text_tokenizer": ("text_embedding.", "text_position.", "text_conv", "text_head."),
    "image_tokenizer": (
        "image_embedding.", "row_embedding.", "column_embedding.", "image_head.", "code_inputs.", "code_outputs.",
    ),
}  # fmt: skip
STAGES = ("text-tokenizer", "image-tokenizer", "decoder", "prior", "ranker")
VALIDATION_IMAGES = 512
INIT = "init.json"  # in a run's folder: the bundle that it started from


class Run:
    """One training directory. Each stage finds what the ones before it left, so a run can go stage by stage."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        sources: tuple[Source, Source],
        report: Report,
        device: torch.device,
        init: Bundle | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.recipe, self.folder, self.report, self.device = recipe, folder, report, device
        self.init, self.should_stop = init, should_stop
        self.train_source, self.val_source = sources

    def stage(self, name: str) -> None:
        """Run one of STAGES."""
        {
            "text-tokenizer": self.text_tokenizer,
            "image-tokenizer": self.image_tokenizer,
            "decoder": self.decoder,
            "prior": self.prior,
            "ranker": self.ranker,
        }[name]()

    # The stages: each gives its result, and makes it where it is not there yet.

    def text_tokenizer(self) -> TextTokenizer:
        place = self.folder / "text_tokenizer.json"
        if place.exists():
            return TextTokenizer.from_json(place.read_text(encoding="utf-8"))
        if self.init is not None and self.recipe.init.text_tokenizer == "keep":
            assert self.init.text_tokenizer is not None  # as `recipe_for_init` makes sure of
            tokenizer = TextTokenizer.from_json(self.init.text_tokenizer)
        else:
            config = self.recipe.text_tokenizer
            tokenizer = TextTokenizer.train(all_captions(self.train_source, config.captions), config.vocab_size)
        _write_text(place, tokenizer.to_json())
        self.report.message(f"text_tokenizer: {tokenizer.vocab_size} entries")
        return tokenizer

    def image_tokenizer(self) -> ImageTokenizer:
        recipe, wanted = self.recipe, self.recipe.init.image_tokenizer
        model = _initialised(lambda: make_image_tokenizer(recipe.image_tokenizer), recipe.seed, "image_tokenizer")
        if self.init is not None and wanted != "own":
            _load(model, self.init, "image_tokenizer")
            if wanted == "keep":
                return model.to(self.device).eval().requires_grad_(False)
        validation = fixed_images(self.val_source, VALIDATION_IMAGES, recipe.data.resolution)
        if (self.init is None or wanted == "own") and not checkpoints(self.folder / ImageTokenizerStage.name):
            model = self._with_start(model, validation)
        stage = ImageTokenizerStage(recipe, model, self.train_source, validation)
        average = self._fit(stage, recipe.image_tokenizer_training)
        assert isinstance(average, ImageTokenizer)
        return average

    def decoder(self) -> ImageTokenizer:
        """The image tokenizer that the bundle gets: with its decoder trained on, if the recipe says so."""
        model, config = self.image_tokenizer(), self.recipe.decoder_training
        if config is None or (self.init is not None and self.recipe.init.image_tokenizer == "keep"):
            return model
        validation = fixed_images(self.val_source, VALIDATION_IMAGES, self.recipe.data.resolution)
        average = self._fit(DecoderStage(self.recipe, config, model, self.train_source, validation), config)
        assert isinstance(average, ImageTokenizer)
        return average

    def _with_start(self, model: ImageTokenizer, validation: Tensor) -> ImageTokenizer:
        """The image tokenizer as its first update finds it: after its kind's start, or the one that the recipe has."""
        recipe = self.recipe
        if model.start_images:
            sample = fixed_images(self.train_source, model.start_images, recipe.data.resolution)
            model.to(self.device).start(sample.to(self.device), generator(recipe.seed, "start"))
        if (config := recipe.autoencoder_training) is None:
            return model
        assert isinstance(model, DVAE)  # as a recipe makes sure of
        autoencoder = _initialised(
            lambda: Autoencoder(model, config.channels, config.noise, config.crop), recipe.seed, "autoencoder"
        )
        average = self._fit(AutoencoderStage(recipe, config, autoencoder, self.train_source, validation), config)
        assert isinstance(average, Autoencoder)
        sample = fixed_images(self.train_source, config.images, recipe.data.resolution).to(self.device)
        found = average.quantise(sample, generator(recipe.seed, "quantise"), config.sharpness)
        figures = code_figures(average.dvae, validation.to(self.device))
        self.report.message(
            f"autoencoder: {model.codebook_size} clusters become the codes (error {found.error:.3f}, noise "
            f"{found.noise:.3f}): {figures.psnr:.2f} dB, {figures.usage:.0%} used"
        )
        return average.dvae.requires_grad_(True)

    def prior(self) -> Prior:
        text_tokenizer, image_tokenizer = self.text_tokenizer(), self.image_tokenizer()
        validation = fixed_images(self.val_source, VALIDATION_IMAGES, self.recipe.data.resolution).to(self.device)
        figures = code_figures(image_tokenizer, validation)
        check_codes(figures, self.recipe.image_tokenizer_training, self.recipe.image_tokenizer)
        train = self._cache("train", self.train_source, image_tokenizer, self.recipe.prior_training.views)
        val = self._cache("val", self.val_source, image_tokenizer, 1)
        shape = StreamShape(
            text_vocab_size=text_tokenizer.vocab_size,
            text_length=self.recipe.text_tokenizer.length,
            codebook_size=image_tokenizer.codebook_size,
            grid=image_tokenizer.grid,
        )
        codebook = image_tokenizer.code_vectors
        model = _initialised(lambda: Prior(self.recipe.prior, shape, codebook), self.recipe.seed, "prior")
        if self.init is not None:
            own = [name for name in TOKENIZERS if getattr(self.recipe.init, name) == "own"]
            _load(model, self.init, "prior", without=tuple(p for name in own for p in PRIOR_TABLES[name]))
        stage = PriorStage(self.recipe, model, text_tokenizer, self.decoder(), train, val)
        average = self._fit(stage, self.recipe.prior_training)
        assert isinstance(average, Prior)
        return average

    def ranker(self) -> CLIP:
        """Raises RequestError where the recipe has none."""
        config, training = self.recipe.ranker, self.recipe.ranker_training
        if config is None or training is None:
            raise RequestError(f"recipe {self.recipe.name} has no ranker: give it `ranker` and `ranker_training`")
        tokenizer = self.text_tokenizer()
        shape = TextShape.of_captions(self.recipe.text_tokenizer.length, tokenizer.vocab_size)
        model = _initialised(lambda: CLIP(config, shape), self.recipe.seed, "ranker")
        # The share of a batch's pairs that belong together; with the 32,768 of the sigmoid loss's paper, its -10.
        torch.nn.init.constant_(model.bias, -math.log(training.batch_size))
        if self.init is not None and "ranker" in self.init.parts and self.recipe.init.text_tokenizer == "keep":
            _load(model, self.init, "ranker")
        pairs = fixed_pairs(self.val_source, VALIDATION_IMAGES, self.recipe.data)
        average = self._fit(RankerStage(self.recipe, training, model, tokenizer, self.train_source, pairs), training)
        assert isinstance(average, CLIP)
        return average

    def bundle(self, out: Path | None = None) -> Path:
        """Write the bundle from the finished stages (weights in 16 bits); its path."""
        out = out or self.folder / "bundle"
        text_tokenizer, image_tokenizer, prior = self.text_tokenizer(), self.decoder(), self.prior()
        weights = {"image_tokenizer": _half(image_tokenizer), "prior": _half(prior)}
        if self.recipe.ranker is not None:
            weights["ranker"] = _half(self.ranker())
        info = {
            "name": self.recipe.name,
            "recipe": to_dict(_without_places(self.recipe)),
            "text_vocab_size": text_tokenizer.vocab_size,
            "metrics": self._metrics(),
            "data": {
                "fingerprint": self.train_source.fingerprint(),
                "images": len(self.train_source),
                "licence": self.recipe.licence,
            },
            "versions": {
                "armchair": armchair.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        write_bundle(
            out, info=info, card=render_card(info), text_tokenizer=text_tokenizer.to_json(), weights=weights
        )
        self.report.message(f"bundle written to {out}")
        return out

    def _fit(self, stage: Stage, config: FitConfig) -> nn.Module:
        return fit(
            stage, config, self.folder / stage.name, self.report, device=self.device, should_stop=self.should_stop
        )

    def _cache(self, name: str, source: Source, tokenizer: ImageTokenizer, views: int) -> TokenCache:
        data = self.recipe.data
        settings = json.dumps(to_dict(data), sort_keys=True) + f"{views} {self.recipe.seed} 1"
        parts = (_weights_digest(tokenizer), source.fingerprint(), settings)
        fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        place = self.folder / "codes" / name
        if (found := open_cache(place, fingerprint)) is not None:
            return found
        began = time.time()

        @torch.inference_mode()
        def encode(images: Tensor) -> Tensor:
            with autocast(self.device, "fp32"):
                return tokenizer.encode(images.to(self.device))

        def progress(done: int, total: int) -> None:
            if done * 10 // total != max(0, done - 64) * 10 // total:
                self.report.message(f"codes/{name}: {done}/{total} images, {done / (time.time() - began):.0f} a second")

        cache = build_cache(
            place, source, data, encode,
            fingerprint=fingerprint, views=views, seed=self.recipe.seed, progress=progress,
        )  # fmt: skip
        self.report.message(f"codes/{name}: {len(cache)} images encoded in {time.time() - began:.0f} s")
        return cache

    def _metrics(self) -> dict[str, dict[str, float | str]]:
        """The last validation of each stage, as the log has it, with the command that makes it again."""
        found: dict[str, dict[str, float | str]] = {}
        recipe = self.recipe
        steps = {"image_tokenizer": recipe.image_tokenizer_training.steps, "prior": recipe.prior_training.steps}
        for name, training in (("decoder", recipe.decoder_training), ("ranker", recipe.ranker_training)):
            if training is not None:
                steps[name] = training.steps
        begun: dict[str, str] = {}
        for line in (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["event"] == "begin" and event.get("command"):
                begun.setdefault(event["stage"], event["command"])
            if event["event"] == "validation" and event["step"] <= steps.get(event["stage"], 0):
                skip = ("time", "event", "stage")
                found[event["stage"]] = {k: v for k, v in event.items() if k not in skip}
        for stage, figures in found.items():
            if command := begun.get(stage, self.report.command):
                figures["command"] = command
        if self.init is not None and recipe.init.image_tokenizer == "keep":
            metrics = self.init.info["metrics"]
            kept = {s: metrics[s] for s in (ImageTokenizerStage.name, DecoderStage.name) if s in metrics}
            found = kept | found
        return found


def start_run(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool,
    report_stream: TextIO | None = None,
    command: str | None = None,
    init: Bundle | None = None,
    **options: Any,
) -> Run:
    """Open a run folder. Raises RequestError where it holds another run, or one that `resume` was not said for.

    A run may go on with a recipe that differs in what nothing made so far depends on, see `_changes`. `command` is what
    the bundle will say that its figures were made by.
    """
    written = folder / "recipe.json"
    text = json.dumps(to_dict(recipe), indent=1, ensure_ascii=False)
    if written.exists():
        if not resume:
            raise RequestError(f"{folder} holds a run already; go on with --resume, or choose another --out")
        _check_init(folder, init)
        begun = from_dict(Recipe, json.loads(written.read_text(encoding="utf-8")))
        if fixed := _changes(begun, recipe, folder):
            differ = f"{', '.join(fixed)} differ from {written}"
            raise RequestError(f"{folder} was begun with another recipe: {differ}; resume it with that one")
    elif resume and folder.exists() and any(folder.iterdir()):
        raise RequestError(f"{folder} holds no run to resume (no recipe.json)")
    if recipe.prior_training.views > 1 and recipe.data.crop == "square":
        logger.warning(
            "prior_training.views is %d, but with data.crop square all views of a picture are the same: set views to "
            "1, or crop to random", recipe.prior_training.views,
        )  # fmt: skip
    sources = _open_data(recipe)  # before anything is written: a wrong path leaves no run behind
    if recipe.ranker is not None and len(sources[1]) < 2:
        raise RequestError("the ranker needs two held-out pictures or more: raise data.val_fraction, or give data.val")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if init is not None:
            _write_text(folder / INIT, json.dumps({"name": init.name, "fingerprint": init.fingerprint}))
        _write_text(written, text)
    except OSError as error:
        raise RequestError(f"cannot write to {folder}: {error.strerror or error}") from None
    report = Report(folder, report_stream, command)
    return Run(recipe, folder, sources=sources, report=report, init=init, **options)


def _check_init(folder: Path, init: Bundle | None) -> None:
    """A run goes on from the bundle that it started from, or from none if it did from none."""
    place = folder / INIT
    begun = json.loads(place.read_text(encoding="utf-8")) if place.exists() else None
    if begun is None and init is not None:
        raise RequestError(f"{folder} was begun without --init; go on without it, or choose another --out")
    if begun is not None and (init is None or init.fingerprint != begun["fingerprint"]):
        came = "without --init" if init is None else f"with --init {init.name} ({init.fingerprint[:12]})"
        raise RequestError(
            f"{folder} started from the bundle {begun['name']} ({begun['fingerprint'][:12]}) and cannot go on {came}; "
            "give that one to --init again"
        )


def _changes(begun: Recipe, recipe: Recipe, folder: Path) -> list[str]:
    """The sections that differ though something in the run was made with them.

    Names, words and how the bundle draws and ranks may change at any time; a decoder's own training, a prior and a
    ranker, which nothing else needs, until they are begun; and how many steps there are, as long as no step so far
    depends on it (`_only_longer`).
    """
    begun, recipe = _without_caption_weight(begun), _without_caption_weight(recipe)
    free = {"name", "description", "licence", "limits", "drawing"}
    for stage in (DecoderStage.name, PriorStage.name, RankerStage.name):
        if not checkpoints(folder / stage):
            free |= {stage, f"{stage}_training"}
    for name in (s.name for s in (AutoencoderStage, ImageTokenizerStage, DecoderStage, PriorStage, RankerStage)):
        if _only_longer(getattr(begun, f"{name}_training"), getattr(recipe, f"{name}_training"), folder / name):
            free.add(f"{name}_training")
    sections = [f.name for f in fields(Recipe) if f.name not in free]
    return [name for name in sections if getattr(begun, name) != getattr(recipe, name)]


def _only_longer(begun: FitConfig | None, now: FitConfig | None, folder: Path) -> bool:
    """Whether two trainings differ in their length alone, and the newest step is from before either cools down."""
    if begun is None or now is None or begun.schedule != "trapezoid":
        return False
    if replace(begun, steps=now.steps, cooldown=now.cooldown) != now:
        return False
    return newest_step(folder) <= min(begun.cooldown_step, now.cooldown_step)


def _without_caption_weight(recipe: Recipe) -> Recipe:
    """The recipe with what the captioner counts in a score as it is by default: training does not depend on it."""
    if recipe.ranker is None or recipe.ranker.captioner is None:
        return recipe
    captioner = replace(recipe.ranker.captioner, weight=CaptionerConfig.weight)
    return replace(recipe, ranker=replace(recipe.ranker, captioner=captioner))


def recipe_for_init(recipe: Recipe, bundle: Bundle) -> Recipe:
    """The recipe with the bundle's model sizes: fine-tuning trains the bundle's own model on other data.

    What `recipe.init` keeps of the tokenizers is as it was when the bundle was made, their training included.
    Raises RequestError for a bundle that was exported: training starts from the weights, not from what rounding left;
    and for one that lacks something.
    """
    if (origin := exported(bundle)) is not None:
        raise RequestError(
            f"{bundle.path} was exported in {origin.format}, for drawing; start from the bundle that it came from, "
            f"{origin.name} ({origin.fingerprint[:12]})"
        )
    for part in ("image_tokenizer", "prior"):
        if part not in bundle.parts:
            raise RequestError(f"{bundle.path} has no {part}, and cannot be trained on; start from one that draws")
    if bundle.text_tokenizer is None and recipe.init.text_tokenizer == "keep":
        raise RequestError(f"{bundle.path} has no text tokenizer to keep: set init.text_tokenizer=own")
    base = from_dict(Recipe, bundle.info["recipe"])
    of_images: dict[str, Any] = {}
    if recipe.init.image_tokenizer != "own":
        of_images["image_tokenizer"] = base.image_tokenizer
        of_images["data"] = replace(recipe.data, resolution=base.data.resolution)
    if recipe.init.image_tokenizer == "keep":
        for name in ("image_tokenizer_training", "autoencoder_training", "decoder_training"):
            of_images[name] = getattr(base, name)
    length = recipe.text_tokenizer.length if recipe.init.text_tokenizer == "own" else base.text_tokenizer.length
    return replace(
        recipe,
        **of_images,
        text_tokenizer=replace(recipe.text_tokenizer, length=length),
        prior=base.prior,
        ranker=None if recipe.ranker_training is None else base.ranker or recipe.ranker,
    )


def _without_places(recipe: Recipe) -> Recipe:
    """The recipe with its data named by file names only: a bundle travels, its maker's folders do not."""
    train, val = ([Path(place).name for place in places] for places in (recipe.data.train, recipe.data.val))
    return replace(recipe, data=replace(recipe.data, train=tuple(train), val=tuple(val)))


def _open_data(recipe: Recipe) -> tuple[Source, Source]:
    data = recipe.data
    if not data.train:
        raise RequestError(f"recipe {recipe.name} names no data: give --data PATH (a folder or .tar shards)")
    train = open_source(data.train, data)
    if data.val:
        return train, open_source(data.val, data)
    if len(train) < 2:
        raise RequestError("one image cannot be both trained and validated on; give data.val")
    return split(train, data.val_fraction)


def _initialised(make: Callable[[], nn.Module], seed: int, name: str):  # type: ignore[no-untyped-def]
    """Build a module with its own random stream; the process's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "initialise", name))
        return make()


def _load(model: nn.Module, bundle: Bundle, part: str, without: tuple[str, ...] = ()) -> None:
    """Weights of a bundle into a model, but for those whose names begin as in `without`, which stay as they are."""
    weights = {k: v.float() for k, v in bundle.weights(part).items() if not k.startswith(without)}
    weights |= {k: v for k, v in model.state_dict().items() if k.startswith(without)} if without else {}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise RequestError(f"{bundle.path}: {part} does not fit the recipe: {first}") from None


def _half(model: nn.Module) -> dict[str, Tensor]:
    weights = {k: v.detach().cpu().half().contiguous() for k, v in model.state_dict().items()}
    for name, w in weights.items():
        if not torch.isfinite(w).all():
            raise WorkError(f"{name} does not fit 16 bits; the weights have diverged")
    return weights


def _weights_digest(model: nn.Module) -> str:
    h = hashlib.sha256()
    for name, w in model.state_dict().items():
        h.update(name.encode())
        h.update(w.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
