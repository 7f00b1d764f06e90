"""A recipe: one YAML file with everything that is needed to make a bundle again."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from armchair.clip.model import CLIPConfig
from armchair.clip.negatives import NearMisses
from armchair.config import by_kind_of, check_name, from_dict, merged, with_overrides
from armchair.data.sources import DataConfig
from armchair.errors import RequestError
from armchair.image.dvae import DVAEConfig
from armchair.image.tokenizer import IMAGE_TOKENIZER_CONFIGS, ImageTokenizerConfig
from armchair.prior.transformer import BASE_WIDTH, PriorConfig

SCHEDULES = ("cosine", "constant", "plateau", "trapezoid")
PRECISIONS = ("auto", "fp32", "bf16")
RANKER_LOSSES = ("softmax", "sigmoid")


@dataclass(frozen=True, kw_only=True)
class TextTokenizerConfig:
    """BPE over lower-cased captions (paper, section 2.2)."""

    vocab_size: int = 16384
    length: int = 256  # tokens a caption is cut or padded to
    dropout: float = 0.1  # BPE dropout in training
    captions: int = 1_000_000  # captions to learn the vocabulary from, at most

    def __post_init__(self) -> None:
        if self.vocab_size < 256:
            raise RequestError(f"vocab_size: expected at least 256 (one a byte), got {self.vocab_size}")
        if self.length < 1:
            raise RequestError(f"length: expected at least 1, got {self.length}")
        if not 0 <= self.dropout < 1:
            raise RequestError(f"dropout: expected 0 or more and less than 1, got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How one stage is optimised. Steps count updates; `lr` is the peak step size."""

    steps: int
    batch_size: int
    accumulate: int = 1  # a batch is computed in this many parts
    at_once: int = 1  # parts computed at the same time on a CPU, each with its share of the threads
    lr: float
    final_lr: float = 0.0  # where a cosine or a trapezoid ends
    warmup: int = 100
    matrix_lr: float | None = None  # peak step size of Muon on the hidden matrices; none: AdamW on all, as in the paper
    schedule: str = "cosine"  # plateau: halved whenever the validation loss stops falling
    cooldown: float = 0.2  # share of the steps, the last ones, over which a trapezoid falls linearly; flat before
    plateau_patience: int = 3  # validations without a new best before the step size is halved
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.999
    precision: str = "auto"
    log_every: int = 20
    validate_every: int = 500
    sheet_every: int = 500
    save_every: int = 200

    def __post_init__(self) -> None:
        every = ("log_every", "validate_every", "sheet_every", "save_every")
        for name in ("steps", "batch_size", "accumulate", "at_once", *every):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise RequestError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if self.accumulate % self.at_once:
            raise RequestError(f"accumulate {self.accumulate} is not a multiple of at_once {self.at_once}")
        for name, valid in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            check_name(name, getattr(self, name), valid)
        for name in ("lr", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise RequestError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if self.matrix_lr is not None and not (math.isfinite(self.matrix_lr) and self.matrix_lr > 0):
            raise RequestError(f"matrix_lr: expected a number above 0, or null, got {self.matrix_lr}")
        if not 0 <= self.ema < 1:
            raise RequestError(f"ema: expected 0 or more and less than 1, got {self.ema}")
        if not 0 < self.cooldown <= 1:
            raise RequestError(f"cooldown: expected a share of the steps, above 0 and at most 1, got {self.cooldown}")

    @property
    def cooldown_step(self) -> int:
        """The first update whose step size is below the peak, under a trapezoid."""
        return self.steps - max(1, round(self.cooldown * self.steps))


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining(FitConfig):
    """A start for stage 1, see `armchair.image.autoencoder`."""

    channels: int = 8  # numbers a position
    noise: float = 0.4  # standard deviation of their noise; they have 1
    sharpness: float = 4.0  # of the first logits: -sharpness * distance^2 / (2 noise^2)
    crop: int | None = None  # side of the crops that are looked at, taken where pixels vary; none: whole pictures
    images: int = 1024  # pictures whose positions the codes are clusters of

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("channels", "images"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("noise", "sharpness"):
            if not getattr(self, name) > 0:
                raise RequestError(f"{name}: expected a number above 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerTraining(FitConfig):
    """Stage 1, whatever the kind of image tokenizer."""

    crop: int | None = None  # side of the crops that are trained on, taken where pixels vary; none: whole pictures
    encoder_scale: float = 1.0  # step size of the encoder, as a share of the others'
    perceptual_weight: float = 0.0  # of the distance between pictures and round trips in an ImageNet network's features
    weight_decay: float = 1e-4
    # The codes are checked before stage 2 starts; below these the run stops.
    min_psnr: float = 15.0
    min_usage: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoder_scale", "perceptual_weight"):
            if not getattr(self, name) >= 0:
                raise RequestError(f"{name}: expected 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DVAETraining(ImageTokenizerTraining):
    """Stage 1 of a dVAE. Temperature and KL weight follow cosines (paper, appendix A.2)."""

    tau_start: float = 1.0
    tau_end: float = 1 / 16
    tau_steps: int = 150_000
    kl_start: float = 0.0
    kl_weight: float = 6.6
    kl_steps: int = 5_000


@dataclass(frozen=True, kw_only=True)
class DecoderTraining(FitConfig):
    """The decoder trained on by itself after stage 1, the codes staying as they are."""

    crop: int | None = None  # as in stage 1
    perceptual_weight: float = 0.0  # as in stage 1
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.perceptual_weight >= 0:
            raise RequestError(f"perceptual_weight: expected 0 or more, got {self.perceptual_weight}")


IMAGE_TOKENIZER_TRAININGS: dict[str, type[ImageTokenizerTraining]] = {
    "dvae": DVAETraining,
    "vq": ImageTokenizerTraining,
    "fsq": ImageTokenizerTraining,
}


@dataclass(frozen=True, kw_only=True)
class PriorTraining(FitConfig):
    """Stage 2."""

    text_weight: float = 1 / 8
    caption_dropout: float = 0.1  # share of captions left out, which is what guidance needs
    dropout: float = 0.0  # share of what a block adds that is left out, against learning few pictures by heart
    code_dropout: float = 0.0  # share of codes that those after them do not see, so that more is left to the caption
    code_noise: float = 0.0  # share of codes that those after them see as another that looks like it
    thinned: float = 0.0  # share of the updates, the first ones, that look at a part of each picture's codes
    thinned_codes: int = 96  # how many, see `armchair.prior.thinning`
    label_smoothing: float = 0.0  # share of a code's target that goes to all codes alike
    lr_width: int = BASE_WIDTH  # the width at which `lr` is stated
    views: int = 1  # times each image is encoded: once as it is, the rest with random crops
    beta2: float = 0.96
    weight_decay: float = 4.5e-2
    clip: float = 4.0
    accuracy_prompts: int = 0  # prompts of the shapes world, of each kind, drawn and read at each validation
    collapse_codes: int = 8  # warn where sampled pictures hold fewer distinct codes (and real ones do not)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_width < 1:
            raise RequestError(f"lr_width: expected at least 1, got {self.lr_width}")
        if self.thinned_codes < 3:  # the first, one where something goes on, and a plain one
            raise RequestError(f"thinned_codes: expected at least 3, got {self.thinned_codes}")
        for name in ("dropout", "code_dropout", "code_noise", "thinned", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise RequestError(f"{name}: expected 0 or more and less than 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RankerTraining(FitConfig):
    """The ranker. The batch is what a caption is told apart from, so it is never computed in parts."""

    loss: str = "softmax"  # symmetric InfoNCE (CLIP), or sigmoid: each pair by itself (SigLIP)
    near_misses: tuple[tuple[str, ...], ...] = ()  # words of a kind; false captions are made by exchanging them
    near_miss_count: int = 1  # false captions a picture
    captioning_weight: float = 2.0  # of the captioner's loss, where there is one, beside the contrastive loss (CoCa)
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("loss", self.loss, RANKER_LOSSES)
        if self.accumulate > 1:
            raise RequestError("accumulate: the ranker's loss needs its batch whole; expected 1")
        if self.batch_size < 2:
            raise RequestError("batch_size: a caption must be told from another; expected at least 2, got 1")
        if self.near_miss_count < 1:
            raise RequestError(f"near_miss_count: expected at least 1, got {self.near_miss_count}")
        if not self.captioning_weight >= 0:
            raise RequestError(f"captioning_weight: expected 0 or more, got {self.captioning_weight}")
        NearMisses(self.near_misses)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What a run that starts from a bundle (`--init`) takes from it. It is not looked at in other runs."""

    text_tokenizer: str = "keep"  # or "own": one of the recipe's, from the recipe's captions
    image_tokenizer: str = "keep"  # "train": goes on from the bundle's; "own": one of the recipe's, from nothing

    def __post_init__(self) -> None:
        check_name("text_tokenizer", self.text_tokenizer, ("keep", "own"))
        check_name("image_tokenizer", self.image_tokenizer, ("keep", "train", "own"))


@dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """The sampling settings that the bundle carries as its defaults, and the prompts of the sample sheets."""

    temperature: float = 1.0
    top_k: int = 0  # 0 means all codes
    top_p: float = 1.0
    min_p: float = 0.0  # 0 means all codes
    naturalness: float = 0.0  # 0 means that the ranker alone ranks
    guidance: float = 1.0  # 1 means off
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    description: str = ""
    licence: str = "not stated"  # of what the bundle was trained on, as its card says it
    limits: str = ""  # what the card says the model cannot do
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    text_tokenizer: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    image_tokenizer: ImageTokenizerConfig = field(default_factory=DVAEConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    ranker: CLIPConfig | None = None  # none: candidates are not ranked
    autoencoder_training: AutoencoderTraining | None = None  # none: the dVAE starts at random, as in the paper
    image_tokenizer_training: ImageTokenizerTraining = field(
        metadata=by_kind_of("image_tokenizer", IMAGE_TOKENIZER_TRAININGS)
    )
    decoder_training: DecoderTraining | None = None  # none: the decoder stays as stage 1 leaves it, as in the paper
    prior_training: PriorTraining
    ranker_training: RankerTraining | None = None
    init: InitConfig = field(default_factory=InitConfig)
    drawing: DrawingConfig = field(default_factory=DrawingConfig)

    def __post_init__(self) -> None:
        if self.data.resolution != self.image_tokenizer.resolution:
            raise RequestError(
                f"data.resolution {self.data.resolution} and image_tokenizer.resolution "
                f"{self.image_tokenizer.resolution} differ; set both to the same number of pixels"
            )
        kind, training = self.image_tokenizer.kind, type(self.image_tokenizer_training)
        if training is not IMAGE_TOKENIZER_TRAININGS[kind]:
            others = " or ".join(repr(k) for k, known in IMAGE_TOKENIZER_TRAININGS.items() if known is training)
            raise RequestError(
                f"image_tokenizer.kind is {kind!r}, and image_tokenizer_training is for {others}: take a recipe of "
                f"kind {kind!r}"
            )
        if kind != "dvae" and self.autoencoder_training is not None:
            raise RequestError(
                f"autoencoder_training is a start for a dVAE, and image_tokenizer.kind is {kind!r}: set it to null"
            )
        if self.prior_training.thinned and not self.prior.full:
            raise RequestError(
                "prior_training.thinned: codes can be left out where all layers have full attention; set "
                "prior.attention to [full] and prior.last_attention to null, or thinned to 0"
            )
        if (self.ranker is None) != (self.ranker_training is None):
            raise RequestError("ranker and ranker_training belong together: give both or neither")
        factor, resolution = self.image_tokenizer.factor, self.image_tokenizer.resolution
        for name in ("autoencoder_training", "image_tokenizer_training", "decoder_training"):
            crop = getattr(getattr(self, name), "crop", None)
            if crop is not None and (crop % factor or not 0 < crop <= resolution):
                raise RequestError(
                    f"{name}.crop: expected a multiple of {factor}, the pixels that a code covers, up to {resolution}, "
                    f"got {crop}"
                )
        if self.image_tokenizer.codebook_size > 65536:
            raise RequestError(
                f"image_tokenizer: at most 65536 codes can be cached, got {self.image_tokenizer.codebook_size}"
            )


def parsed_overrides(items: Sequence[str]) -> dict[str, Any]:
    """What `--set` takes, `A.B=C` with C in YAML, as dotted names and values. Raises RequestError for anything else."""
    import yaml  # part of the `train` extra: drawing needs no YAML

    overrides = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise RequestError(f"--set {item!r}: expected NAME=VALUE, such as prior.n_layer=4")
        try:
            overrides[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise RequestError(f"--set {item!r}: {value!r} is not a YAML value") from None
    return overrides


def read_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a YAML recipe strictly. `overrides` are dotted names, `{"prior.n_layer": 4}`.

    A file with `base: OTHER.yaml`, a path from its own folder, says only what differs from that recipe. Where that is
    the kind of image tokenizer, what the other kind alone knows is left behind.

    Raises RequestError for a file that is missing or not YAML, and for unknown fields.
    """
    data = _fields(path, ())
    try:
        return from_dict(Recipe, with_overrides(data, overrides or {}))
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def _fields(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """What the file says, over what its base says. `above`: the files that have led here."""
    import yaml  # part of the `train` extra: drawing needs no YAML

    if path.resolve() in above:
        raise RequestError(f"{path}: base: a recipe cannot be its own base")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        because = f", which {above[-1]} names as its base" if above else ""
        raise RequestError(f"no recipe at {path}{because}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise RequestError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RequestError(f"{path}: expected a mapping of fields, got {type(data).__name__}")
    if "base" not in data:
        return data
    base = data.pop("base")
    if not isinstance(base, str):
        raise RequestError(f"{path}: base: expected the path of a recipe, got {base!r}")
    below = _fields(path.parent / base, (*above, path.resolve()))
    return merged(_without_other_kinds(below, data), data)


def _without_other_kinds(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` without the fields of its kind of image tokenizer that the kind that `above` says does not have."""

    def kind_in(data: dict[str, Any], otherwise: Any) -> Any:
        section = data.get("image_tokenizer")
        return section.get("kind", otherwise) if isinstance(section, dict) else otherwise

    before = kind_in(below, "dvae")
    after = kind_in(above, before)
    if after == before or not isinstance(after, str) or after not in IMAGE_TOKENIZER_CONFIGS:
        return below
    known: dict[str, type] = {
        "image_tokenizer": IMAGE_TOKENIZER_CONFIGS[after],
        "image_tokenizer_training": IMAGE_TOKENIZER_TRAININGS[after],
    }
    kept = dict(below)
    for section, config in known.items():
        if isinstance(kept.get(section), dict):
            names = {f.name for f in fields(config)}
            kept[section] = {name: value for name, value in kept[section].items() if name in names}
    if after != "dvae":
        kept.pop("autoencoder_training", None)
    return kept
