"""What the documents say of commands, files and fields is so."""

import argparse
import dataclasses
import json
import re
import runpy
import shlex
import sys
import typing
from pathlib import Path

import pytest

from armchair import cli
from armchair.config import to_dict
from armchair.data.emoji import CAPTIONS, PACKAGES
from armchair.image.fsq import FSQConfig
from armchair.image.tokenizer import IMAGE_TOKENIZER_CONFIGS
from armchair.image.vq import VQConfig
from armchair.train.recipe import IMAGE_TOKENIZER_TRAININGS, DVAETraining, FitConfig, Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:^|`|&& )(armchair [a-z][^`\n]*)", re.MULTILINE)
MEASURED = re.compile(r"python\s+(benchmarks/[^`\n]+)")


def commands() -> list[str]:
    found = [c for path in DOCUMENTS for c in COMMAND.findall(path.read_text(encoding="utf-8"))]
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_the_documents_commands_are_understood(command, monkeypatch):
    understood = []
    for name, known in cli.COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, dataclasses.replace(known, run=understood.append))
    _, *words = shlex.split(command)
    if words[0] in cli.COMMANDS and len(words) == 1:
        return  # the command is only spoken of
    assert cli.main(words) == 0
    assert len(understood) == 1


class Parsed(Exception):
    """A benchmark has come to its flags."""


def benchmark_commands() -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in (*DOCUMENTS, ROOT / "CHANGELOG.md")]
    return sorted({" ".join(c.split()) for text in texts for c in MEASURED.findall(text)})


@pytest.mark.parametrize("command", benchmark_commands())
def test_the_documents_benchmarks_are_there_and_know_their_flags(command, monkeypatch):
    script, *words = shlex.split(command)
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, *given, **options):
        parse(self, words if words else [])
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(Parsed if words else (Parsed, SystemExit)) as end:  # spoken of without its arguments
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert isinstance(end.value, Parsed) or end.value.code == 2


def test_there_are_commands_to_check():
    assert 'armchair draw "a red apple"' in commands() and len(commands()) >= 8
    assert len(benchmark_commands()) >= 20


def test_the_readme_opens_with_two_commands_of_one_line():
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2 and all(len(block.splitlines()) == 1 for block in blocks)
    assert blocks[0].endswith('&& armchair draw "a red apple"\n')
    assert blocks[1].endswith("&& pytest -n 2 --dist worksteal\n")


def test_the_map_has_every_source_file_and_no_other():
    (text,) = re.findall(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    folder, mapped = "", set()
    for line in text.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        else:
            mapped.add(folder + name)
    missing = sorted(name for name in mapped if not (ROOT / name).is_file())
    assert not missing
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "src").rglob("*.py") if p.stat().st_size > 100}
    assert sources - mapped - {"src/armchair/__main__.py"} == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        place = path.parent / name if name else path
        assert place.is_file(), target
        if place.suffix != ".md":
            continue
        headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in {h.lower().replace(" ", "-") for h in headings}, target


def tables() -> dict[str, dict[str, str]]:
    """Section -> field -> default, of docs/recipes.md."""
    found: dict[str, dict[str, str]] = {}
    section = ""
    for line in (ROOT / "docs/recipes.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif row := re.match(r"\| `([\w.]+)` \| (.*?) \| .+ \|$", line):
            found.setdefault(section, {})[row[1]] = row[2]
    return found


def default_of(f: dataclasses.Field) -> str:
    if f.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(to_dict(f.default_factory()))}`"
    return "required" if f.default is dataclasses.MISSING else f"`{json.dumps(to_dict(f.default))}`"


# Sections of a recipe that have other fields for other kinds of image tokenizer, which have tables of their own.
KINDS: dict[str, dict[str, type]] = {
    "image_tokenizer": {"vq": VQConfig, "fsq": FSQConfig},
    "image_tokenizer_training": {"dvae": DVAETraining},
}


def expected() -> dict[str, dict[str, str]]:
    fit = {f.name: default_of(f) for f in dataclasses.fields(FitConfig)}
    found: dict[str, dict[str, str]] = {"recipe": {}, "Training of the stages": fit}
    hints = typing.get_type_hints(Recipe)
    for f in dataclasses.fields(Recipe):
        told = (hints[f.name], *typing.get_args(hints[f.name]))  # of `X | None` too, and the first of several kinds
        config = next((hint for hint in told if dataclasses.is_dataclass(hint)), None)
        if config is None or f.default is None:
            found["recipe"][f.name] = default_of(f)
        else:
            found["recipe"][f.name] = "required" if f.default_factory is dataclasses.MISSING else "see below"
        if config is None:
            continue
        for kind, other in KINDS.get(f.name, {}).items():
            more = {g.name: default_of(g) for g in dataclasses.fields(other)}
            first = {g.name: default_of(g) for g in dataclasses.fields(config)}
            found[f"{f.name} of kind {kind}"] = {name: d for name, d in more.items() if first.get(name) != d}
        own = {}
        for g in dataclasses.fields(config):
            hint = typing.get_type_hints(config)[g.name]
            nested = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
            if nested is None or g.default is None:  # the whole of it may be left out
                own[g.name] = default_of(g)
            if nested is not None:
                own |= {f"{g.name}.{h.name}": default_of(h) for h in dataclasses.fields(nested)}
        if issubclass(typing.cast(type, config), FitConfig):
            own = {name: default for name, default in own.items() if fit.get(name) != default}
        found[f.name] = own
    return found


@pytest.mark.parametrize("section", expected())
def test_every_recipe_field_is_documented_with_its_default(section):
    assert tables().get(section) == expected()[section]


def test_the_tables_are_of_every_kind_of_image_tokenizer():
    assert {"dvae", *KINDS["image_tokenizer"]} == set(IMAGE_TOKENIZER_CONFIGS) == set(IMAGE_TOKENIZER_TRAININGS)
    plain = {k for k, training in IMAGE_TOKENIZER_TRAININGS.items() if "tau_start" not in training.__dataclass_fields__}
    assert {"dvae"} == set(KINDS["image_tokenizer_training"]) == set(IMAGE_TOKENIZER_TRAININGS) - plain


def test_every_package_of_the_emoji_set_is_credited():
    text = (ROOT / "docs/emoji.md").read_text(encoding="utf-8")
    notice = " ".join((ROOT / "NOTICE").read_text(encoding="utf-8").split())
    recipe = (ROOT / "recipes/emoji.yaml").read_text(encoding="utf-8")
    for package in (*PACKAGES, CAPTIONS):
        assert f"`{package.name}` {package.version} | {package.licence} | {package.credit} |" in text
        assert package.licence in recipe
    for package in PACKAGES:
        looks = package.manner.removesuffix(" style")
        assert f"| {package.style} | {looks} | `{package.name}`" in text
        name, _, holder = package.credit.partition(", ")
        assert name.split(" (")[0] in notice and holder in notice
