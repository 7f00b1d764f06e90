"""The command line: a table of commands, each a plain function of its parsed flags.

Whatever a command needs is imported inside it, so that `--help` and wrong requests answer at once. Results go
to stdout, everything that is for people to stderr; exit codes are in `armchair.errors`, 130 is Ctrl-C.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from armchair import __version__, environment
from armchair.config import nearest
from armchair.errors import ArmchairError, RequestError

if TYPE_CHECKING:
    from armchair.sample.pipeline import Drawing

TRACEBACK = "ARMCHAIR_TRACEBACK"
INTERRUPTED = 130
GUIDED_ROWS = 2  # a candidate has a row with its caption, and one without where there is guidance


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    logger = logging.getLogger("armchair")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("armchair: %(message)s"))
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        say("armchair: interrupted")
        return INTERRUPTED
    except Exception as error:
        if "--traceback" in argv or os.environ.get(TRACEBACK, "0") not in ("", "0"):
            traceback.print_exc()
        return _tell(error)
    finally:
        logger.removeHandler(handler)


def say(text: str) -> None:
    """One line for people."""
    print(text, file=sys.stderr, flush=True)


def _tell(error: Exception) -> int:
    wrong_path = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
    code = error.exit_code if isinstance(error, ArmchairError) else 2 if isinstance(error, wrong_path) else 1
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        text = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    elif not isinstance(error, ArmchairError):
        text = f"unexpected {type(error).__name__}: {text[:300]} (--traceback or {TRACEBACK}=1 shows where)"
    say(f"armchair: error: {text}")
    return code


# Drawing.


@contextlib.contextmanager
def _opening() -> Iterator[None]:
    """While a command imports and opens what drawing needs, no garbage is looked for, of which there is hardly any.

    To look is to walk through all that the import of PyTorch made, several times until the first picture and once more
    at the end; frozen, it is left out afterwards too.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def draw(args: argparse.Namespace) -> None:
    environment.for_drawing(GUIDED_ROWS * args.candidates, args.weights)
    with _opening():
        from armchair.sample.pipeline import check_free, load_artist, target_paths
        from armchair.sample.ranker import check_prompt

        out, finished = Path(args.out), (args.candidates + 1) // 2 if args.halve else args.candidates
        count = args.keep or finished
        for prompt in args.prompts:
            check_prompt(prompt)
        if len(args.prompts) > 1 and out.suffix.lower() == ".png" and not out.is_dir():
            raise RequestError(f"--out {out} is one file for {len(args.prompts)} prompts; name a folder")
        check_free([path for p in args.prompts for path in target_paths(out, p, count, args.grid)], args.force)
        artist = load_artist(args.model, args.device, args.ranker, args.weights)
    results = []
    for prompt in args.prompts:
        began = time.perf_counter()
        progress = _DrawingProgress(prompt)
        drawing = artist.draw(prompt, **_sampling(args), halve=args.halve, progress=progress)
        results.append(_save(drawing, out, args, time.perf_counter() - began))
    if args.json:
        print_json(results[0] if len(results) == 1 else results)


def complete(args: argparse.Namespace) -> None:
    environment.for_drawing(GUIDED_ROWS * args.candidates, args.weights)
    with _opening():
        from PIL import Image

        from armchair.image.pixels import BrokenSample, read_image
        from armchair.sample.pipeline import check_free, load_artist, target_paths
        from armchair.sample.ranker import check_prompt

        out = Path(args.out)
        check_prompt(args.prompt)
        try:
            image = Image.fromarray(read_image(Path(args.image)))
        except BrokenSample as broken:
            raise RequestError(f"{args.image}: {broken.cause}; expected a PNG, JPEG or the like") from None
        check_free(target_paths(out, args.prompt, args.keep or args.candidates, args.grid), args.force)
        artist = load_artist(args.model, args.device, args.ranker, args.weights)
    began = time.perf_counter()
    progress = _DrawingProgress(args.prompt)
    drawing = artist.complete(
        image, args.prompt, redraw=args.redraw, keep_top=args.keep_top, **_sampling(args), progress=progress
    )
    result = _save(drawing, out, args, time.perf_counter() - began)
    if args.json:
        print_json(result)


def redraw(args: argparse.Namespace) -> None:
    with _opening():
        from armchair.sample.pipeline import check_free, parse_record, redraw_png, target_paths

        record = parse_record(Path(args.image))  # a picture without one is refused before anything else
        environment.for_drawing(GUIDED_ROWS, record.weights)
        (target,) = target_paths(Path(args.out), f"{Path(args.image).stem} again", 1)
        check_free([target], args.force)
    began = time.perf_counter()
    drawing = redraw_png(args.image, args.device, args.model)
    result = _save(drawing, target, args, time.perf_counter() - began)
    if args.json:
        print_json(result)


class _DrawingProgress:
    """Says every few seconds how many candidates are drawn; nothing where all of them soon are."""

    every = 5.0  # seconds

    def __init__(self, prompt: str):
        self.prompt = prompt
        self.began = self.said = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        from armchair.runtime import duration

        now = time.perf_counter()
        if done < total and now - self.said >= self.every:
            left = duration((now - self.began) / done * (total - done))
            say(f"{self.prompt[:60]!r}: {done} of {total} drawn, {left} left")
            self.said = now


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    names = ("candidates", "keep", "seed", "naturalness")
    return {**{name: getattr(args, name) for name in names}, **_settings(args)}


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What `_settings_flags` ask for, None for the bundle's own."""
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "guidance")}


def _save(drawing: "Drawing", out: Path, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    paths = drawing.save(out, grid=args.grid, force=args.force)
    count = len(drawing.images)
    names = str(paths[0]) if len(paths) == 1 else f"{paths[0]} … {paths[-1].name}"
    pictures = "1 picture" if count == 1 else f"{count} pictures"
    scores = ""
    if (best := drawing.scores[0]) is not None:
        scores = f", score {best:.3f}" if count == 1 else f", scores {best:.3f} to {drawing.scores[-1]:.3f}"
    say(f"{pictures} of {drawing.prompt[:60]!r} in {seconds:.1f} s{scores} -> {names}")
    return drawing.to_json(paths)


def bench(args: argparse.Namespace, what: str) -> None:
    from dataclasses import replace

    from armchair.bench.run import bench as measure
    from armchair.bench.run import growth, plot, plot_growth, report, rounded, run, table
    from armchair.bench.shape import Job

    sizes = {name: getattr(args, name) for name in BENCH_SIZES}
    job = Job(system="armchair-int8" if what == "sampling" else "armchair", what=what, **sizes)
    for path in filter(None, (args.plot, getattr(args, "growth", None))):
        if os.path.lexists(path) and not args.force:
            raise RequestError(f"{path} is there already: choose another name, or --force")
    if job.width % job.heads:
        raise RequestError(f"--width {job.width} is not a multiple of --heads {job.heads}")
    systems = ["armchair"]
    if what == "sampling":
        systems = [weights if weights == "plain" else f"armchair-{weights}" for weights in args.weights]
    systems += [name for names in args.against for name in names.split(",") if name]
    options = {"precisions": args.precision or _precisions()} if what == "training" else {}
    found = measure(
        job, systems, args.batch, peer_python=args.peer_python, rounds=args.rounds, say=say, **options
    )
    machine, parts = run(replace(job, system="armchair-int8"), extra="bounds"), {}
    if what == "sampling":
        for system in systems:
            if system.startswith("armchair-"):
                for batch in args.batch:
                    result = run(replace(job, system=system, batch=batch), extra="parts")
                    parts[f"{system}, batch {batch}"] = result["parts"]
    data = rounded(report(job, found, machine, parts))
    if args.plot:
        plot(data, Path(args.plot))
        say(f"plot -> {args.plot}")
    if getattr(args, "growth", None):
        data["growth"] = rounded(growth(job, say))
        plot_growth(data["growth"], Path(args.growth))
        say(f"growth -> {args.growth}")
    if args.json:
        print_json(data)
    else:
        print(table(data))


def _precisions() -> list[str]:
    import torch

    from armchair.runtime import has_fast_bfloat16

    if has_fast_bfloat16(torch.device("cpu")):
        return ["bf16", "fp32"]
    say("this processor has no bf16: fp32 alone is timed")
    return ["fp32"]


def bench_sampling(args: argparse.Namespace) -> None:
    bench(args, "sampling")


def bench_training(args: argparse.Namespace) -> None:
    bench(args, "training")


# Training and data.


def train(args: argparse.Namespace) -> int:
    try:
        import yaml  # noqa: F401
    except ImportError:
        raise RequestError("training needs more packages: pip install 'armchair[train]'") from None
    from armchair.bundle import find_bundle, read_bundle
    from armchair.runtime import pick_device
    from armchair.train.loop import Interrupted
    from armchair.train.recipe import parsed_overrides, read_recipe
    from armchair.train.run import recipe_for_init, start_run

    environment.for_training()
    overrides: dict[str, Any] = {}
    if args.data:  # the recipe's own validation pictures are of its own data
        overrides = {"data.train": args.data, "data.val": []}
    recipe = read_recipe(Path(args.recipe), overrides | parsed_overrides(args.set))
    init = None
    if args.init is not None:
        init = read_bundle(find_bundle(args.init))
        recipe = recipe_for_init(recipe, init)
    folder = Path(args.out or f"runs/{recipe.name}")
    device = pick_device(args.device)
    with _first_interrupt_asks() as should_stop:
        run = start_run(
            recipe,
            folder,
            resume=args.resume,
            report_stream=sys.stderr,
            command=train_command(args.recipe, args.set, args.data or (), args.init),
            device=device,
            init=init,
            should_stop=should_stop,
        )
        try:
            if args.stage == "all":
                run.bundle()
            else:
                run.stage(args.stage)
        except Interrupted as stopped:
            say(f"armchair: {stopped}; go on with --resume")
            return INTERRUPTED
        finally:
            run.report.close()
    return 0


def train_command(recipe: str, sets: Sequence[str], data: Sequence[str] = (), init: str | None = None) -> str:
    """The command that makes such a run again, whatever folders its data lie in here."""

    def travelling(text: str) -> str:
        return re.sub(r"(?<![\w.}*-])(?:~|\.{1,2})?/(?:[^/\s,\[\]]+/)*(?=[^/\s,\[\]])", "", text)

    words = ["armchair", "train", travelling(recipe)]
    for flag, values in (("--data", data), ("--init", [init] if init else ())):
        words += [flag, *map(travelling, values)] if values else []
    for item in sets:
        words += ["--set", travelling(item)]
    return shlex.join(words)


@contextlib.contextmanager
def _first_interrupt_asks() -> Iterator[Callable[[], bool]]:
    """While inside, the first Ctrl-C only turns the yielded function true; the second stops at once."""
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not `say`: the signal may have come in the middle of a write to stderr.
        os.write(2, b"\narmchair: stopping after this step; Ctrl-C again stops at once\n")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


BUILDERS = {"shapes": ("count", "seed", "split"), "emoji": ("cache", "size", "workers")}  # sets, and their own flags


def data_build(args: argparse.Namespace) -> None:
    if args.name not in BUILDERS:
        raise RequestError(f"unknown set {args.name!r}: {nearest(args.name, BUILDERS)}")
    for name, flags in BUILDERS.items():
        for flag in flags:
            if name != args.name and getattr(args, flag) is not None:
                raise RequestError(f"--{flag} is for the set {name}, not for {args.name}")
    if args.out is None:
        if args.name == "shapes":
            raise RequestError("--out DIR is missing; shapes:train,length=1000 is the same world without a folder")
        from armchair.data.sources import data_home

        args.out = str(data_home() / "emoji")
    (_build_shapes if args.name == "shapes" else _build_emoji)(args)


def _build_emoji(args: argparse.Namespace) -> None:
    from armchair.data.emoji import SIZE, build_emoji

    began = time.perf_counter()
    found = build_emoji(
        Path(args.out),
        size=args.size or SIZE,
        cache=None if args.cache is None else Path(args.cache),
        workers=args.workers,
        force=args.force,
        say=lambda text: say(f"{time.perf_counter() - began:5.0f} s  {text}"),
    )
    left_out = {**found["left_out"], "broken": len(found["left_out"]["broken"])}
    counts = ", ".join(f"{n} {split}" for split, n in found["images"].items())
    say(f"left out: {', '.join(f'{n} {cause}' for cause, n in left_out.items())}")
    say(f"{counts} captioned images -> {args.out}; its LICENCES.md says whose they are")


def _build_shapes(args: argparse.Namespace) -> None:
    from PIL import Image

    from armchair.shapes.world import ShapesSource

    count = 20_000 if args.count is None else args.count
    source = ShapesSource(count, seed=args.seed or 0, split=args.split or "train")
    out = Path(os.path.realpath(args.out))
    _check_buildable(out, args.force)
    partial, old = (out.with_name(f".{out.name}.{uuid.uuid4().hex}.{state}") for state in ("partial", "old"))
    digits = max(6, len(str(len(source) - 1)))
    try:
        partial.mkdir(parents=True)
        for i in range(len(source)):
            picture, captions = source[i]
            name = f"{i:0{digits}}"
            Image.fromarray(picture).save(partial / f"{name}.png")
            (partial / f"{name}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
            if (i + 1) * 10 // len(source) != i * 10 // len(source):
                say(f"{i + 1} of {len(source)} pictures")
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"{len(source)} captioned images -> {args.out}")


def _check_buildable(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise RequestError(f"{out} is a file; --out names a folder")
    names = sorted(os.listdir(out))
    if names and not force:
        raise RequestError(f"{out} is not empty: choose another folder, or --force to replace the set in it")
    if others := [name for name in names if not re.fullmatch(r"\d{6,}\.(png|txt)", name)]:
        raise RequestError(f"{out} holds {others[0]!r}, which would be lost: choose another folder")


def data_inspect(args: argparse.Namespace) -> None:
    from armchair.data.inspection import inspect
    from armchair.data.sources import DataConfig, open_source

    sheet = None if args.sheet is None else Path(args.sheet)
    if sheet is not None and os.path.lexists(sheet) and not args.force:
        raise RequestError(f"{sheet} is there already: choose another name, or --force")
    config = DataConfig()
    found = inspect(open_source(args.paths, config), config, sheet=sheet)
    if sheet is not None:
        say(
            f"contact sheet -> {sheet}" if found["images"] else "no contact sheet: there is no usable picture"
        )
    if args.json:
        print_json(found)
        return
    words = found["caption_words"]
    broken = ", ".join(f"{n} {cause}" for cause, n in found["broken"].items())
    rows = {
        "images": found["images"],
        "broken": broken or "none",
        "captions": found["captions"],
        "words a caption": "{min} to {max}, median {median:g}".format(**words) if words else "-",
        "distinct words": found["distinct_words"],
        "frequent words": ", ".join(f"{word} {n}" for word, n in found["frequent_words"][:15]) or "-",
        "sizes": ", ".join(f"{size} {n}" for size, n in found["sizes"].items()) or "-",
        "beyond 2:1": f"{found['odd_aspect']:.1%}",
        "duplicates": found["duplicates"],
    }
    print_rows(rows)


def evaluate(args: argparse.Namespace) -> None:
    from armchair.eval.report import PAGE
    from armchair.eval.run import EvaluateConfig
    from armchair.eval.run import evaluate as measure
    from armchair.sample.pipeline import load_artist

    report = Path(args.report)
    if report.exists() and not report.is_dir():
        raise RequestError(f"{report} is a file; --report names a folder")
    without: frozenset[str] = frozenset()
    if args.without_overlap is not None:
        lines = Path(args.without_overlap).read_text(encoding="utf-8").splitlines()
        without = frozenset(line.strip() for line in lines if line.strip())
    if args.human is not None:
        return _human(args, report, without)
    if args.data is None:
        raise RequestError("--data names captioned images that the model did not learn from, and is missing")
    if os.path.lexists(report / PAGE) and not args.force:
        raise RequestError(f"{report / PAGE} is there already: choose another folder, or --force")
    sizes = {name: value for name in vars(EvaluateConfig()) if (value := getattr(args, name)) is not None}
    config = EvaluateConfig(**sizes)
    artist = load_artist(args.model, args.device, args.ranker, args.weights).with_settings(**_settings(args))
    began = time.perf_counter()
    sections = measure(
        artist,
        args.data,
        report,
        train=args.train or (),
        suites=args.suite or (),
        features=args.features,
        without=without,
        without_list=args.without_overlap or "",
        config=config,
        say=lambda text: say(f"{time.perf_counter() - began:5.0f} s  {text}"),
    )
    for section in sections:
        if section.skipped:
            say(f"{section.key}: not measured. {section.skipped}")
    say(f"report -> {report / PAGE}")
    if args.json:
        sys.stdout.write((report / "report.json").read_text(encoding="utf-8"))


def _human(args: argparse.Namespace, report: Path, without: frozenset[str]) -> None:
    """Draw for both systems, unless that is done; serve the ballot; write the results when stopped."""
    from armchair.eval.ballot import Ballot, results_plot
    from armchair.eval.ballot_page import ballot_app
    from armchair.eval.contest import PictureFolder, is_picture_folder, make_contest
    from armchair.sample.pipeline import load_artist

    try:
        import uvicorn
    except ImportError:
        raise RequestError("the ballot's page needs more packages: pip install 'armchair[evaluate,serve]'") from None
    places = (args.model, args.human)
    if args.data is None and not any(map(is_picture_folder, places)):
        raise RequestError("--data names captioned images whose captions both models draw, and is missing")
    first, second = (
        PictureFolder(place)
        if is_picture_folder(place)
        else load_artist(place, args.device, args.ranker, args.weights).with_settings(**_settings(args))
        for place in places
    )
    count, seed = args.pictures or 100, args.seed or 0
    contest = make_contest(first, second, args.data or (), count=count, seed=seed, without=without, say=say)
    store = report / "ballot.sqlite"
    if os.path.lexists(store):
        ballot = Ballot(store)
        ballot.check_made_of(contest.made_of())
    else:
        pictures = contest.pictures(say)
        ballot = Ballot.create(
            store, contest.names, contest.captions, *pictures, seed=contest.seed, made_of=contest.made_of()
        )
    say(f"{ballot.about['first']} against {ballot.about['second']}: http://{args.host}:{args.port}/ (Ctrl-C ends it)")
    server = uvicorn.Server(uvicorn.Config(ballot_app(ballot), host=args.host, port=args.port, log_level="warning"))
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    results = {**ballot.results(), "made_of": ballot.made_of}
    plot = results_plot(results)
    (report / f"{plot.name}.png").write_bytes(plot.png)
    (report / "ballot.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    say(f"results so far -> {report / 'ballot.json'}; the same command goes on with the vote")
    if args.json:
        print_json(results)


def import_openai_clip(args: argparse.Namespace) -> None:
    from armchair.importing.openai_clip import import_openai_clip

    out = Path(args.out)
    model = import_openai_clip(
        Path(args.path),
        out,
        vocabulary=None if args.vocabulary is None else Path(args.vocabulary),
        activation=args.activation,
        force=args.force,
    )
    count = sum(p.numel() for p in model.parameters())
    say(f"a ranker of {count / 1e6:.1f} M parameters -> {out}; armchair draw PROMPT --ranker {out} uses it")


def export(args: argparse.Namespace) -> None:
    from armchair.sample.export import export_bundle

    out = Path(args.out)
    export_bundle(args.bundle, out, args.format, force=args.force)
    say(f"{args.bundle} in {args.format} -> {out}; armchair draw PROMPT --model {out} draws the same codes")


def serve(args: argparse.Namespace) -> None:
    environment.for_serving()
    with _opening():
        try:
            import fastapi  # noqa: F401
            import python_multipart  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError:
            raise RequestError("serving needs more packages: pip install 'armchair[serve]'") from None
        import torch

        from armchair.serve.app import Config, data_folder, run
        from armchair.serve.guard import MIB
        from armchair.serve.keys import Keys, add_key
        from armchair.serve.models import GIB, Models
        from armchair.serve.service import Service

    file = None if args.api_key_file is None else Path(args.api_key_file)
    if args.add_key is not None:
        if file is None:
            raise RequestError("--add-key NAME needs --api-key-file FILE, to which the key's hash is added")
        print(add_key(file, args.add_key))
        say(f"this key is shown once; its hash is in {file}")
        return
    for flag, value in (("--memory", args.memory), ("--grace", args.grace)):
        if not 0 < value < 1e6:
            raise RequestError(f"{flag}: expected a number above 0, got {value}")
    config = Config(
        host=args.host,
        port=args.port,
        keys=None if file is None else Keys.read(file),
        allow_hosts=tuple(args.allow_host),
        allow_origins=tuple(args.allow_origin),
        body=args.max_body * MIB,
        data=data_folder() if args.data is None else Path(args.data),
        ballot=None if args.ballot is None else Path(args.ballot),
        grace=args.grace,
    )
    aliases = {}
    for item in args.alias:
        alias, equals, name = item.partition("=")
        if not (alias and equals and name):
            raise RequestError(f"--alias {item!r}: expected NAME=MODEL, such as dall-e-3=emoji")
        aliases[alias] = name
    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 2) // 2))
    models = Models(
        args.model,
        aliases=aliases,
        memory=int(args.memory * GIB),
        device=args.device,
        weights=args.weights,
        queue=args.queue,
    )
    run(Service(models, candidates=args.max_candidates), config, say)


def data_overlap(args: argparse.Namespace) -> None:
    from armchair.data.sources import DataConfig, open_source
    from armchair.eval.overlap import find_overlap
    from armchair.sample.ranker import load_ranker

    out, sheet = (None if name is None else Path(name) for name in (args.out, args.sheet))
    for path in (out, sheet):
        if path is not None and os.path.lexists(path) and not args.force:
            raise RequestError(f"{path} is there already: choose another name, or --force")
    ranker = None if args.ranker is None else load_ranker(args.ranker, args.device)
    train, bench = (open_source([path], DataConfig()) for path in (args.train, args.bench))
    found = find_overlap(
        train, bench, ranker=ranker, threshold=args.threshold, shown=args.pairs if sheet else 0, say=say
    )
    if sheet is not None:
        found.sheet(args.pairs).save(sheet, format="PNG")
        say(f"the {min(args.pairs, len(found.matches))} nearest pairs -> {sheet}; choose --threshold by looking")
    if out is not None:
        out.write_text("".join(f"{match.bench}\n" for match in found.duplicates), encoding="utf-8")
        say(f"their keys -> {out}; armchair evaluate --without-overlap {out} leaves them out")
    if args.json:
        matches = [vars(match) for match in found.matches]
        print_json({"compared_by": found.by, "threshold": found.threshold, "matches": matches})
        return
    share = len(found.duplicates) / len(found.matches)
    print_rows(
        {
            "benchmark pictures": len(found.matches),
            "in the training data": f"{len(found.duplicates)} ({share:.1%})",
            "compared by": found.by,
            "up to a distance of": found.threshold,
        }
    )


def info(args: argparse.Namespace) -> None:
    from armchair.bundle import find_bundle, read_bundle
    from armchair.sample.weights import exported

    bundle = read_bundle(find_bundle(args.model))
    sizes = {
        part: sum(w.numel() for name, w in bundle.weights(part).items() if not name.endswith(".step"))
        for part in bundle.parts
    }
    known = {**bundle.info, "name": bundle.name, "fingerprint": bundle.fingerprint, "path": str(bundle.path)}
    if args.json:
        print_json({**known, "parameters": sizes, "card": bundle.card})
        return
    rows = {name: known[name] for name in ("name", "path", "fingerprint")}
    rows |= {part: f"{n / 1e6:.2f} M parameters" for part, n in sizes.items()}
    if (origin := exported(bundle)) is not None:
        rows["exported"] = f"{origin.format} from {origin.name} {origin.fingerprint}"
    print_rows(rows)
    print(f"\n{bundle.card.rstrip()}")  # metrics, data and licence are in it


def print_json(data: Any) -> None:
    print(json.dumps(data))  # ASCII: any prompt fits any terminal's encoding


def print_rows(rows: dict[str, Any]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")


# Flags.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; see {self.prog} --help")


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        span = f"from {low} to {high}" if high else f"of {low} or more"
        with contextlib.suppress(ValueError):
            value = int(text)
            if low <= value and (high is None or value <= high):
                return value
        raise argparse.ArgumentTypeError(f"expected a whole number {span}, got {text!r}")

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _corners(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,9},\d{1,9}(,\d{1,9},\d{1,9})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected X,Y or X,Y,X2,Y2 in pixels, got {text!r}")
    return tuple(map(int, text.split(",")))


def _model_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", metavar="M", help="bundle directory or .zip, bundled name or hub id")
    p.add_argument("--device", default="auto", help="auto (the default), cpu or cuda")


def _output_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--out", default=".", metavar="FILE|DIR", help="a name in .png or a folder (default: here)"
    )
    p.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    p.add_argument("--force", action="store_true", help="overwrite files")


def _sampling_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "-n", "--candidates", type=_whole(1, 4096), default=4, metavar="N", help="how many (default: 4)"
    )
    p.add_argument(
        "--keep", type=_whole(0, 4096), default=0, metavar="K", help="keep the best K (default 0: all, sorted)"
    )
    p.add_argument("--ranker", metavar="M", help="a bundle whose ranker shall judge, in place of the model's own")
    p.add_argument(
        "--seed", type=_whole(0, 2**63 - 1), default=0, help="another seed, other pictures (default: 0)"
    )
    _settings_flags(p)
    p.add_argument(
        "--naturalness",
        type=_number,
        metavar="W",
        help="how much it counts, beside the ranker, how likely a picture is by itself; 0 for not at all",
    )
    p.add_argument("--grid", action="store_true", help="write a contact sheet NAME-grid.png too")
    _weights_flag(p)


def _settings_flags(p: argparse.ArgumentParser) -> None:
    """How codes are drawn; the defaults are the bundle's."""
    p.add_argument("--temperature", type=_number, metavar="T", help="0 is greedy, 1 the model's own spread")
    p.add_argument("--top-k", type=_whole(0), metavar="K", help="draw from the K likeliest codes, 0 for all")
    p.add_argument(
        "--top-p", type=_number, metavar="P", help="draw from the likeliest codes of mass P, 1 for all"
    )
    p.add_argument(
        "--min-p", type=_number, metavar="P", help="leave out codes under P times as likely as the first, 0 for none"
    )
    p.add_argument("--guidance", type=_number, metavar="G", help="1 is off; more follows the prompt closer")


def _weights_flag(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--weights",
        metavar="W",
        help="form of the weights that codes are drawn with: int8 (for a CPU, the default there and the fastest), "
        "bf16 (the default on a GPU that has it) or fp32",
    )


def _draw_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw; several are drawn one by one")
    _model_flags(p)
    _sampling_flags(p)
    p.add_argument(
        "--halve",
        action="store_true",
        help="finish only the candidates whose upper halves the ranker finds better, half of them",
    )
    _output_flags(p)


def _complete_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "image", metavar="IMAGE", help="a picture, cut square and resized to the model's resolution"
    )
    p.add_argument("prompt", metavar="PROMPT", help="what the whole picture shall show")
    where = p.add_mutually_exclusive_group()
    where.add_argument(
        "--keep-top", type=_number, metavar="FRACTION", help="share of the height to keep (default: 0.5)"
    )
    where.add_argument(
        "--redraw",
        type=_corners,
        metavar="X,Y[,X2,Y2]",
        help="rectangle to draw anew, in pixels of the result",
    )
    _model_flags(p)
    _sampling_flags(p)
    _output_flags(p)


def _redraw_flags(p: argparse.ArgumentParser) -> None:
    p.set_defaults(grid=False)
    p.add_argument("image", metavar="IMAGE.png", help="a PNG that armchair wrote")
    _model_flags(p)
    _output_flags(p)


def _train_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as recipes/shapes.yaml")
    p.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="PATH",
        help="train on these folders or .tar shards; a part is kept aside to validate on",
    )
    p.add_argument("--out", metavar="RUN", help="the run's folder (default: runs/NAME)")
    p.add_argument("--init", metavar="BUNDLE", help="start from the weights of this bundle")
    stages = ("text-tokenizer", "image-tokenizer", "decoder", "prior", "ranker", "all")
    p.add_argument(
        "--stage", choices=stages, default="all", help="one stage, or all and the bundle (default)"
    )
    p.add_argument("--resume", action="store_true", help="go on with the run in RUN")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="change a field of the recipe, any number of times",
    )
    p.add_argument("--device", default="auto", help="auto (the default), cpu or cuda")


def _build_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "name",
        metavar="NAME",
        help="shapes: flat shapes with exact captions; emoji: icons in nine styles, fetched with npm",
    )
    p.add_argument(
        "--out",
        metavar="DIR",
        help="a folder: NAME.png and NAME.txt a picture, or .tar shards of emoji (emoji, by default: where "
        "`--data emoji` finds it, $ARMCHAIR_DATA or ~/.local/share/armchair)",
    )
    p.add_argument("--count", type=_whole(1), metavar="N", help="shapes: pictures (default: 20000)")
    p.add_argument("--seed", type=_whole(0), help="shapes: default: 0")
    p.add_argument("--split", help="shapes: train (default), val, held-form-colour, …")
    p.add_argument("--size", type=_whole(8, 512), metavar="N", help="emoji: pixels on a side (default: 128)")
    p.add_argument("--cache", metavar="DIR", help="emoji: where packages are kept (default: in the folder --out)")
    p.add_argument("--workers", type=_whole(1), metavar="N", help="emoji: processes that draw (default: one a core)")
    p.add_argument("--force", action="store_true", help="replace the set that is in DIR")


def _inspect_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "paths", nargs="+", metavar="PATH", help="folders, .tar shards, globs, or shapes:val,length=100"
    )
    p.add_argument("--sheet", metavar="FILE", help="write a PNG with some of the pictures and captions")
    p.add_argument("--json", action="store_true", help="print the counts as JSON")
    p.add_argument("--force", action="store_true", help="overwrite FILE")


def _overlap_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("train", metavar="TRAIN", help="what was learned from: a folder, .tar shards, a glob or a range")
    p.add_argument("bench", metavar="BENCH", help="what is to be measured on")
    p.add_argument("--ranker", metavar="M", help="compare through this bundle's ranker (default: a perceptual hash)")
    p.add_argument("--threshold", type=_number, metavar="D", help="distance up to which two are the same")
    p.add_argument("--out", metavar="LIST", help="write the keys of the benchmark pictures that were found, one a line")
    p.add_argument("--sheet", metavar="FILE", help="write a PNG of the nearest pairs, nearest first, with distances")
    p.add_argument("--pairs", type=_whole(1), default=48, metavar="N", help="pairs on the sheet (default: 48)")
    p.add_argument("--device", default="auto", help="auto (the default), cpu or cuda")
    p.add_argument("--json", action="store_true", help="print every pair as JSON")
    p.add_argument("--force", action="store_true", help="overwrite files")


def _evaluate_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="a bundle directory or .zip, a bundled name or a hub id")
    p.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="PATH",
        help="captioned images it did not learn from; a must, but for --human with a folder of pictures",
    )
    p.add_argument(
        "--train",
        nargs="+",
        action="extend",
        metavar="PATH",
        help="those it did: for the overfitting gap and near-copies",
    )
    p.add_argument("--report", required=True, metavar="DIR", help="where index.html, its pictures and report.json go")
    p.add_argument(
        "--suite",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="some of: reconstruction, likelihood, distribution, fidelity, best-of, diversity, memorising, probe",
    )
    p.add_argument(
        "--features",
        nargs="+",
        default=["efficientnet-lite0"],
        metavar="NAME",
        help="what pictures are compared through: efficientnet-lite0 (the default), ranker, or a TorchScript file",
    )
    p.add_argument("--ranker", metavar="M", help="a bundle whose ranker shall judge, in place of the model's own")
    _settings_flags(p)
    _weights_flag(p)
    p.add_argument(
        "--without-overlap", metavar="LIST", help="leave out the pictures whose keys are in this file, one a line"
    )
    for name, what in (
        ("pictures", "held-out pictures, and drawings of their captions (default: 500)"),
        ("train-pictures", "training pictures to look for near-copies in (default: 5000)"),
        ("prompts", "prompts of each split of the shapes world (default: 100)"),
        ("best-of-prompts", "prompts for best of N (default: 24)"),
        ("most", "candidates a prompt for best of N (default: 32; the paper has 512)"),
        ("diversity-prompts", "prompts of which eight are drawn each (default: 24)"),
        ("blur", "pictures at each blur radius, 0 for none (default: 128)"),
        ("memorising", "drawings looked up among the training pictures (default: 500)"),
        ("probe", "pictures for image to image (default: 32)"),
        ("seed", "default: 0"),
    ):
        p.add_argument(f"--{name}", type=_whole(0), metavar="N", help=what)
    p.add_argument(
        "--human",
        metavar="SYSTEM",
        help="instead: let people judge SYSTEM's drawings against this one's, on a local page; --pictures captions. "
        "Either may be a folder of captioned pictures that another system made",
    )
    p.add_argument("--host", default="127.0.0.1", help="of that page (default: 127.0.0.1)")
    p.add_argument("--port", type=_whole(1, 65535), default=8765, metavar="P", help="of that page (default: 8765)")
    p.add_argument("--device", default="auto", help="auto (the default), cpu or cuda")
    p.add_argument("--json", action="store_true", help="print the figures as JSON too")
    p.add_argument("--force", action="store_true", help="replace the report that is in DIR")


def _import_clip_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", metavar="PATH", help="a .safetensors, .bin or .pt file of weights; nothing in it is run")
    p.add_argument("--out", required=True, metavar="DIR", help="the bundle to write, a directory or a .zip")
    p.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="bpe_simple_vocab_16e6.txt.gz, which comes with the models' code (default: the one beside PATH)",
    )
    p.add_argument(
        "--activation",
        default="quick_gelu",
        help="quick_gelu (the default, OpenAI's models) or gelu (most of OpenCLIP's)",
    )
    p.add_argument("--force", action="store_true", help="replace the bundle that is at DIR")


def _export_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("bundle", metavar="BUNDLE", help="a bundle directory or .zip, a bundled name or a hub id")
    p.add_argument("--format", required=True, metavar="F", help="int8: the prior's matrices have eight bits a weight")
    p.add_argument("--out", required=True, metavar="DIR", help="the bundle to write, a directory or a .zip")
    p.add_argument("--force", action="store_true", help="replace the bundle that is at DIR")


BENCH_SIZES = ("text", "grid", "text_vocab", "codebook", "width", "depth", "heads", "threads")


def _serve_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="M",
        help="bundle directory or .zip, bundled name or hub id, or NAME=M; several, the first is the default",
    )
    p.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="another name for a model, for clients that have one built in: dall-e-3=emoji",
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    p.add_argument("--port", type=_whole(1, 65535), default=8000, help="default: 8000")
    p.add_argument(
        "--api-key-file", metavar="F", help="ask for a key of this file, NAME:SHA256 a line; a must for other hosts"
    )
    p.add_argument("--add-key", metavar="NAME", help="make a key, add its hash to the file, print it, and end")
    p.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name that requests may be addressed to (default: this machine's; with another --host any)",
    )
    p.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this site ask, such as https://example.org (default: none)",
    )
    p.add_argument("--data", metavar="DIR", help="where the page keeps its history (default: your data folder)")
    p.add_argument("--ballot", metavar="FILE", help="a ballot.sqlite of armchair evaluate --human, to vote on")
    p.add_argument(
        "--queue", type=_whole(1, 100_000), default=64, metavar="N", help="requests a model that may wait (default: 64)"
    )
    p.add_argument(
        "--max-candidates", type=_whole(1, 4096), default=512, metavar="N", help="of one request (default: 512)"
    )
    p.add_argument("--max-body", type=_whole(1, 1024), default=32, metavar="MIB", help="of a form (default: 32)")
    p.add_argument(
        "--memory", type=_number, default=4.0, metavar="GIB", help="of models that are open at a time (default: 4)"
    )
    p.add_argument("--threads", type=_whole(1, 1024), metavar="N", help="that draw (default: half of the cores)")
    p.add_argument(
        "--grace", type=_number, default=30.0, metavar="S", help="seconds to finish in when stopped (default: 30)"
    )
    p.add_argument("--device", default="auto", help="auto (the default), cpu or cuda")
    _weights_flag(p)


def _bench_flags(p: argparse.ArgumentParser, batches: list[int]) -> None:
    from armchair.bench.shape import Job

    p.add_argument(
        "--against",
        nargs="+",
        action="extend",
        default=[],
        metavar="PEER",
        help="dalle-pytorch, dalle-pytorch-cached, gpt2, min-dalle, where you have installed them (docs/speed.md)",
    )
    p.add_argument(
        "--peer-python", default=sys.executable, metavar="PYTHON", help="the Python of the peers' environment"
    )
    p.add_argument(
        "--batch", nargs="+", type=_whole(1, 512), default=batches, metavar="B", help=f"default: {batches}"
    )
    p.add_argument("--rounds", type=_whole(1, 99), default=3, metavar="N", help="medians are over these (default: 3)")
    for name in BENCH_SIZES:
        default = getattr(Job(system=""), name)
        p.add_argument(
            f"--{name.replace('_', '-')}", type=_whole(1), default=default, metavar="N", help=f"default: {default}"
        )
    p.add_argument("--plot", metavar="FILE", help="write a PNG with the medians")
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    p.add_argument("--force", action="store_true", help="overwrite files")


def _bench_sampling_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--weights",
        nargs="+",
        choices=("int8", "bf16", "fp32", "plain"),
        default=["int8", "fp32", "plain"],
        help="ours, others being compared with the first; plain: the literal decoder (default: int8 fp32 plain)",
    )
    p.add_argument("--growth", metavar="FILE", help="write a PNG of the speed against grid, depth and candidates")
    _bench_flags(p, [1, 8])


def _bench_training_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--precision",
        nargs="+",
        choices=("bf16", "fp32"),
        help="default: bf16 fp32, or fp32 on a processor without bf16, which would take hours",
    )
    _bench_flags(p, [4])


def _info_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "model", nargs="?", metavar="MODEL", help="a bundle; the bundled default where none is given"
    )
    p.add_argument("--json", action="store_true", help="print everything as JSON")


@dataclass(frozen=True)
class Command:
    run: Callable[[argparse.Namespace], int | None]
    flags: Callable[[argparse.ArgumentParser], None]
    summary: str
    example: str


COMMANDS = {
    "draw": Command(
        draw,
        _draw_flags,
        "draw pictures of a prompt",
        'armchair draw "a red apple" -n 8 --seed 7 --out pictures/ --grid',
    ),
    "complete": Command(
        complete,
        _complete_flags,
        "redraw a part of a picture, keep the rest pixel for pixel",
        'armchair complete apple.png "a red apple" --keep-top 0.5\n'
        'armchair complete apple.png "a red apple" --redraw 16,16,48,48 --out middle.png',
    ),
    "redraw": Command(
        redraw,
        _redraw_flags,
        "draw a picture again from the metadata inside its PNG, bit for bit",
        "armchair redraw a-red-apple-01.png --out again.png",
    ),
    "train": Command(
        train,
        _train_flags,
        "train a recipe to a bundle; Ctrl-C saves the state first",
        "armchair train recipes/shapes.yaml --out runs/shapes --set prior_training.steps=500\n"
        "armchair train recipes/emoji.yaml --data my-pictures/ --init emoji --out runs/mine",
    ),
    "data build": Command(
        data_build,
        _build_flags,
        "write a built-in set of captioned images",
        "armchair data build shapes --out my-shapes/ --count 1000\narmchair data build emoji",
    ),
    "data inspect": Command(
        data_inspect,
        _inspect_flags,
        "count what is in captioned images, and look at some",
        "armchair data inspect my-pictures/ --sheet sheet.png",
    ),
    "data overlap": Command(
        data_overlap,
        _overlap_flags,
        "find benchmark pictures that are in the training data, nearly",
        "armchair data overlap 'train-{0000..0004}.tar' val-0000.tar --out overlap.txt --sheet overlap.png",
    ),
    "evaluate": Command(
        evaluate,
        _evaluate_flags,
        "measure a model on pictures it has not seen, as a page with figures, plots and pictures",
        "armchair evaluate emoji --data val-0000.tar --train 'train-{0000..0004}.tar' --report emoji-report",
    ),
    "bench sampling": Command(
        bench_sampling,
        _bench_sampling_flags,
        "time drawing beside peers and beside what the machine allows",
        "armchair bench sampling --against dalle-pytorch-cached,gpt2 --peer-python peers/bin/python --plot speed.png",
    ),
    "bench training": Command(
        bench_training,
        _bench_training_flags,
        "time training beside peers",
        "armchair bench training --against dalle-pytorch,gpt2 --peer-python peers/bin/python",
    ),
    "import openai-clip": Command(
        import_openai_clip,
        _import_clip_flags,
        "make a released CLIP's weights a ranker for one's own drawings",
        "armchair import openai-clip ViT-B-32.pt --out clip-b32\n"
        'armchair draw "a red apple" -n 64 --keep 4 --ranker clip-b32',
    ),
    "export": Command(
        export,
        _export_flags,
        "write a bundle in a form that is smaller and opens sooner",
        "armchair export emoji --format int8 --out emoji-int8\n"
        'armchair draw "a red apple" --model emoji-int8',
    ),
    "serve": Command(
        serve,
        _serve_flags,
        "serve models over HTTP: an API in the shape of OpenAI's Images, and a page",
        "armchair serve\n"
        "armchair serve --model emoji --model mine=runs/mine/bundle --alias dall-e-3=emoji\n"
        "armchair serve --api-key-file keys.txt --add-key anna\n"
        "armchair serve --host 0.0.0.0 --api-key-file keys.txt",
    ),
    "info": Command(
        info,
        _info_flags,
        "what a bundle is: sizes, figures, data, licence",
        "armchair info runs/shapes/bundle",
    ),
}


def _run(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        print(_overview(""))
        return 0
    if argv[:1] == ["--version"]:
        print(f"armchair {__version__}")
        return 0
    name = " ".join(argv[:2]) if " ".join(argv[:2]) in COMMANDS else " ".join(argv[:1])
    command = COMMANDS.get(name)
    if command is None:
        return _no_command(argv)
    parser = _Parser(
        prog=f"armchair {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=f"example:\n{command.example}".replace("\n", "\n  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.flags(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an unexpected error came from")
    # Flags may stand between prompts; the intermixed parser of Python 3.11 does not know `--`.
    parse = parser.parse_known_args if "--" in argv else parser.parse_known_intermixed_args
    try:
        args, rest = parse(argv[len(name.split()) :])
    except SystemExit:  # --help
        return 0
    if flag := next((word for word in rest if word.startswith("-")), None):
        flags = [f for f in parser._option_string_actions if f.startswith("--")]
        parser.error(f"unknown flag {flag!r}: {nearest(flag.partition('=')[0], flags)}")
    if rest:
        parser.error(f"unexpected {rest[0]!r}")
    return command.run(args) or 0


def _no_command(argv: list[str]) -> int:
    group = f"{argv[0]} " if argv else ""
    if group and any(name.startswith(group) for name in COMMANDS):
        if argv[1:2] in (["-h"], ["--help"]):
            print(_overview(group))
            return 0
    else:
        group = ""
    given = " ".join(argv[: 2 if group else 1])
    known = [name for name in COMMANDS if name.startswith(group)]
    if given == group.strip():
        raise RequestError(f"no command: choose from {', '.join(known)}; see armchair --help")
    raise RequestError(f"unknown command {given!r}: {nearest(given, known)}; see armchair --help")


def _overview(group: str) -> str:
    commands = {name: c for name, c in COMMANDS.items() if name.startswith(group)}
    lines = [f"usage: armchair {group}COMMAND …", "", "Text-to-image models, from data to pictures.", ""]
    lines += [f"  {name:20}{command.summary}" for name, command in commands.items()]
    example = next(iter(commands.values())).example
    return "\n".join([*lines, "", "armchair COMMAND --help tells more. For example:", f"  {example}"])


if __name__ == "__main__":
    sys.exit(main())
