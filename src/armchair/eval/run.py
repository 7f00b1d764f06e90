"""`armchair evaluate`: all tests, or some, into one report."""

import platform
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from armchair import __version__
from armchair.config import nearest
from armchair.errors import RequestError
from armchair.eval.best_of import best_of, diversity
from armchair.eval.distribution import distribution
from armchair.eval.features import OFFLINE, EfficientNetLite0, FeatureNetwork, RankerFeatures, TorchScriptNetwork
from armchair.eval.fidelity import fidelity
from armchair.eval.figures import RESAMPLES, Section
from armchair.eval.likelihood import likelihood
from armchair.eval.memorising import memorising
from armchair.eval.pairs import Context, read_pairs
from armchair.eval.probe import probe
from armchair.eval.reconstruction import reconstruction
from armchair.eval.report import write_report
from armchair.sample.pipeline import Artist
from armchair.text.bpe import cuts_summed_up

SUITES: dict[str, Callable[[Context], Section]] = {
    "reconstruction": reconstruction,
    "likelihood": likelihood,
    "distribution": distribution,
    "fidelity": fidelity,
    "best-of": best_of,
    "diversity": diversity,
    "memorising": memorising,
    "probe": probe,
}
DRAWING = frozenset({"distribution", "fidelity", "best-of", "diversity", "memorising", "probe"})  # those that draw


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How much to measure. The defaults take about a quarter of an hour on two CPU cores for the shipped model."""

    pictures: int = 500  # held-out pictures, and drawings of their captions
    train_pictures: int = 5000  # of the training pictures, to look for near-copies in
    prompts: int = 100  # of each split of the shapes world
    best_of_prompts: int = 24
    most: int = 32  # candidates a prompt
    diversity_prompts: int = 24
    blur: int = 128  # pictures of a side, at each radius
    memorising: int = 500  # drawings looked up among the training pictures
    probe: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < (0 if name in ("seed", "blur") else 2):
                raise RequestError(f"{name}: expected 2 or more, got {value}")


def feature_networks(names: Sequence[str], artist: Artist) -> list[FeatureNetwork]:
    """`efficientnet-lite0`, `ranker`, or the path of a TorchScript network, in this order of use.

    Raises RequestError for another name, and for a ranker that is not there.
    """
    networks: list[FeatureNetwork] = []
    for name in names:
        if name == OFFLINE:
            networks.append(EfficientNetLite0())
        elif name == "ranker":
            if artist.ranker is None:
                raise RequestError(f"--features ranker: bundle {artist.bundle.name} has none, and --ranker names none")
            networks.append(RankerFeatures(artist.ranker))
        elif Path(name).suffix in (".pt", ".ts", ".pth"):
            networks.append(TorchScriptNetwork(Path(name)))
        else:
            raise RequestError(
                f"unknown features {name!r}: {nearest(name, (OFFLINE, 'ranker'))}, or a TorchScript file in .pt"
            )
    return networks


def evaluate(
    artist: Artist,
    data: Sequence[str],
    report: Path,
    *,
    train: Sequence[str] = (),
    suites: Sequence[str] = (),
    features: Sequence[str] = (OFFLINE,),
    without: frozenset[str] = frozenset(),
    without_list: str = "FILE",
    config: EvaluateConfig | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Section]:
    """Measure a bundle on captioned pictures that it has not seen, and write `report`/index.html and report.json.

    train: the pictures that it learned from, for the overfitting gap and near-copies. suites: names of SUITES, all by
    default. without: keys of pictures to leave out, such as `armchair data overlap` found; without_list: the
    name of the file that has them, for the command that makes the report again. All that is drawn is drawn with the
    artist's settings (`Artist.with_settings` has others than the bundle's). The report is written anew
    after each test, so that one that is stopped has what was measured. Raises RequestError for an unknown suite or
    feature network, DataError for data that cannot be read.
    """
    config = config or EvaluateConfig()
    for name in suites:
        if name not in SUITES:
            raise RequestError(f"unknown suite {name!r}: {nearest(name, SUITES)}")
    chosen = [name for name in SUITES if not suites or name in suites]
    networks = feature_networks(features, artist)
    held_out = read_pairs(data, artist, config.pictures, without)
    seen = read_pairs(train, artist, config.train_pictures) if train else None
    options = {name: value for name, value in vars(config).items() if name != "seed"}
    context = Context(
        artist=artist,
        held_out=held_out,
        train=seen,
        networks=networks,
        data=tuple(data),
        seed=config.seed,
        options=options,
        say=say,
    )
    settings, own = vars(artist.settings), vars(artist.bundle_settings)
    changed = [f"{name} {own[name]}" for name in settings if settings[name] != own[name]]
    drawn_with = ", ".join(f"{name} {value}" for name, value in settings.items()) + f", weights in {artist.weights}"
    if changed:
        drawn_with += f" (the bundle's own: {', '.join(changed)})"
    about = {
        "bundle": f"{artist.bundle.name}, {artist.bundle.fingerprint[:16]}",
        "ranker": "none" if artist.ranker is None else f"{artist.ranker.id.name}, {artist.ranker.id.fingerprint[:16]}",
        "held-out pictures": f"{len(held_out)} of data {held_out.fingerprint[:16]}"
        + (f", {len(without)} keys left out" if without else ""),
        "training pictures": "not given" if seen is None else f"{len(seen)} of data {seen.fingerprint[:16]}",
        "drawn with": drawn_with,
        "seed": str(config.seed),
        "intervals": f"95 %: of means, percentiles of {RESAMPLES} bootstrap resamples; of shares, Wilson's; or as said",
        "made by": _command(artist, data, train, suites, features, without_list if without else None, config),
        "versions": f"armchair {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}",
    }
    done: list[Section] = []
    for number, name in enumerate(chosen, start=1):
        say(f"{name} ({number} of {len(chosen)})")
        began = time.perf_counter()
        with cuts_summed_up():
            section = SUITES[name](context)
        section.seconds = time.perf_counter() - began
        if name in DRAWING and not section.skipped:
            section.protocol += f" Drawn with {drawn_with}."
        done.append(section)
        write_report(report, f"{artist.bundle.name}, measured", about, done)
    return done


def _command(
    artist: Artist,
    data: Sequence[str],
    train: Sequence[str],
    suites: Sequence[str],
    features: Sequence[str],
    without_list: str | None,
    config: EvaluateConfig,
) -> str:
    """What makes the report again, its files by their names only: a report travels, its maker's folders do not.

    Form of weights and device are always in it, as what they are by default depends on the machine.
    """
    words = ["armchair", "evaluate", artist.bundle.name, "--data", *(Path(place).name for place in data)]
    if train:
        words += ["--train", *(Path(place).name for place in train)]
    if suites:
        words += ["--suite", *suites]
    if tuple(features) != (OFFLINE,):
        words += ["--features", *(Path(name).name for name in features)]
    if artist.ranker is not None and artist.ranker.id != artist.id:
        words += ["--ranker", artist.ranker.id.name]
    for name, value in vars(artist.settings).items():
        if value != getattr(artist.bundle_settings, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--weights", artist.weights, "--device", artist.device.type]
    if without_list is not None:
        words += ["--without-overlap", Path(without_list).name]
    for name, value in vars(config).items():
        if value != getattr(EvaluateConfig(), name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--report", "DIR"])
