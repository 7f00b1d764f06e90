"""From the names of icons to what they show: labels, keywords and groups of the Unicode CLDR, and captions.

Icon sets call the same thing by many names: its code points, its CLDR name of today or of some years ago, its
Unicode name, a shortcode, the words run together. `Names` knows them all; a set's own name is the last resort.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

NUMBER = re.compile(r"(?<=.)-\d+$")  # `baby-1`, `baby-2`: drawn more than once
SHORTCODES = ("emojibase", "github", "iamcal", "joypixels")  # the first that has a name decides
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
TAGS_TOLD = 3  # keywords in one caption

# Words of two letters that names run together are parted at; shorter ones are found everywhere.
SHORT_WORDS = ("at", "by", "in", "no", "of", "ok", "on", "to", "up")

# What no list has: names of one set, by what the CLDR calls the same.
HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
SPELLINGS = {
    "fxemoji": {
        **{f"clock{i}oclock": f"{hour} o’clock" for i, hour in enumerate(HOURS, start=1)},
        **{f"clock{i}thirty": f"{hour}-thirty" for i, hour in enumerate(HOURS, start=1)},
        **{f"heart{colour}": f"{colour} heart" for colour in ("blue", "green", "purple", "yellow")},
        "chineseflag": "flag: China",
        "franceflag": "flag: France",
        "greatbritainflag": "flag: United Kingdom",
        "guardsman": "man guard",
        "italianflag": "flag: Italy",
        "japanflag": "flag: Japan",
        "koreaflag": "flag: South Korea",
    },
    "streamline-emojis": {"japan": "flag: Japan", "turkey": "flag: Türkiye"},  # its countries are flags
}


@dataclass(frozen=True)
class Meaning:
    """What a picture shows: its name, keywords and kind. `hexcode`: its code points, `1F34E`, where it has some."""

    label: str
    tags: tuple[str, ...] = ()
    group: str = ""
    subgroup: str = ""
    hexcode: str | None = None


def slug(text: str) -> str:
    """`flag: Côte d’Ivoire` -> `flag-cote-divoire`, as icon sets write names."""
    plain = unicodedata.normalize("NFKD", re.sub(r"[’'.]", "", text)).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9*#]+", "-", plain.replace("&", " and ")).strip("-")


def own_name(icon: str) -> str:
    """`accept-database` -> `accept database`: what an icon shows by its own name."""
    return NUMBER.sub("", icon).replace("-", " ")


def plain_hexcode(hexcode: str) -> str:
    """Code points in capitals and without variation selectors, which sets write or leave out as they like."""
    return hexcode.upper().replace("-FE0F", "")


@dataclass(frozen=True)
class Names:
    """Every name of every emoji. `meanings` and the values of `hexcodes` are by plain hexcodes."""

    meanings: Mapping[str, Meaning]
    hexcodes: Mapping[str, str]  # slug -> hexcode
    words: frozenset[str]  # what names that are run together are parted into
    squeezed: Mapping[str, str] = field(init=False)  # the same slugs without hyphens

    def __post_init__(self) -> None:
        squeezed: dict[str, str] = {}
        for name, hexcode in self.hexcodes.items():
            squeezed.setdefault(name.replace("-", ""), hexcode)
        object.__setattr__(self, "squeezed", squeezed)

    def find(self, icon: str, hexcode: str | None, group: str, prefix: str, squeezed: bool) -> Meaning | None:
        """What the icon called `icon` shows, or None where its name says nothing.

        hexcode: its code points where the set knows them; group: its kind in the set, used where the CLDR has
        none; prefix: the set; squeezed: it writes names without hyphens.
        """
        if hexcode is not None:
            known = self.meanings.get(plain_hexcode(hexcode))
        else:
            known = self._by_name(icon, SPELLINGS.get(prefix, {}), squeezed)
        if known is not None:
            return known if known.group else replace(known, group=group)
        label = self._part(icon.replace("-", "")) if squeezed else own_name(icon)
        return None if label is None else Meaning(label, group=group, hexcode=hexcode and plain_hexcode(hexcode))

    def _by_name(self, icon: str, spellings: Mapping[str, str], squeezed: bool) -> Meaning | None:
        name = icon.replace("flag-for-flag-", "flag-for-")
        for candidate in (slug(spellings.get(name, name)), NUMBER.sub("", name)):
            found = self.hexcodes.get(candidate) or (self.squeezed.get(candidate) if squeezed else None)
            if found is not None:
                return self.meanings[found]
        return None

    def _part(self, text: str) -> str | None:
        """The words of a name that is run together: as few as do, the longer ones of as many. None: it has none."""
        best: list[tuple[int, int, list[str]] | None] = [(0, 0, [])] + [None] * len(text)
        for end in range(1, len(text) + 1):
            for start in range(end):
                word, before = text[start:end], best[start]
                if before is None or not (
                    word in SHORT_WORDS or (word in self.words and (len(word) > 2 or word.isdigit()))
                ):
                    continue
                found = (before[0] + 1, before[1] - len(word) ** 2, [*before[2], word])
                if (now := best[end]) is None or found[:2] < now[:2]:
                    best[end] = found
        whole = best[-1]
        return None if whole is None else " ".join(whole[2])


def read_names(emojibase: Callable[[str], Any], listed: Iterable[Mapping[str, str]]) -> Names:
    """The names in `emojibase-data` and in icon sets.

    emojibase: reads a JSON file of the package, by its path in it. listed: of each set that has them, names of
    icons -> hexcodes, the most trusted set first.
    """
    meanings = _read_meanings(emojibase)
    hexcodes: dict[str, str] = {}

    def add(name: str, hexcode: str) -> None:
        if name and plain_hexcode(hexcode) in meanings:
            hexcodes.setdefault(name, plain_hexcode(hexcode))

    labels = {meaning.label: hexcode for hexcode, meaning in meanings.items()}
    for label, hexcode in labels.items():
        add(slug(label), hexcode)
    for label, hexcode in labels.items():
        add(slug(re.sub(r"\(.*\)", "", label)), hexcode)  # `A button (blood type)`
        kind, _, what = label.partition(": ")
        if kind == "flag":
            add(f"flag-for-{slug(what)}", hexcode)
        if kind == "keycap":
            add(f"keycap-{slug(what)}", hexcode)
        if label.startswith("regional indicator "):
            add(f"letter-{slug(label[-1])}", hexcode)
        if ": " in label and label.endswith(" skin tone"):
            add(slug(label.removesuffix(" skin tone")), hexcode)
    for names in listed:
        for name, hexcode in names.items():
            add(name, hexcode)
    unicode_names = emojibase("meta/unicode-names.json")
    for hexcode, name in unicode_names.items():
        add(slug(name), hexcode)
    for source in SHORTCODES:
        for hexcode, codes in emojibase(f"en/shortcodes/{source}.json").items():
            for code in [codes] if isinstance(codes, str) else codes:
                add(slug(code), hexcode)
    texts = [text for meaning in meanings.values() for text in (meaning.label, *meaning.tags)]
    words = {word for text in [*texts, *unicode_names.values()] for word in slug(text).split("-")}
    return Names(meanings=meanings, hexcodes=hexcodes, words=frozenset(words))


def _read_meanings(emojibase: Callable[[str], Any]) -> dict[str, Meaning]:
    keys, told = emojibase("meta/groups.json"), emojibase("en/messages.json")
    groups, subgroups = (
        {int(number): messages.get(key, key) for number, key in keys[kind].items()}
        for kind in ("groups", "subgroups")
        for messages in ({entry["key"]: entry["message"] for entry in told[kind]},)
    )
    meanings = {}
    for emoji in emojibase("en/data.json"):
        for entry in (emoji, *emoji.get("skins", ())):  # skin tones have the keywords of the plain one
            meanings[plain_hexcode(entry["hexcode"])] = Meaning(
                entry["label"],
                tuple(emoji.get("tags", ())),
                groups.get(entry.get("group"), ""),
                subgroups.get(entry.get("subgroup"), ""),
                plain_hexcode(entry["hexcode"]),
            )
    return meanings


def caption_lines(meaning: Meaning, style: str, manner: str, key: str) -> list[str]:
    """The captions of a picture in several wordings, lower case, each once.

    First name and style, which pictures are measured with; then the name alone, the name and how the style
    looks (`flat style`), the name and its kind, and some of its keywords: those that the hash of `key` picks, so that
    the same thing in other styles is spoken of in other words.
    """
    tags = [tag for tag in meaning.tags if any(letter.isalnum() for letter in tag)]  # not `?` nor `✓`
    picked = sorted(tags, key=lambda tag: hashlib.sha256(f"{key}/{tag}".encode()).digest())[:TAGS_TOLD]
    kind = meaning.subgroup or meaning.group
    lines = [f"{meaning.label}, {style}", meaning.label, f"{meaning.label}, {manner}"]
    if kind:
        lines.append(f"{meaning.label}, {kind}")
    if picked:
        lines.append(" ".join(tag for tag in tags if tag in picked))
    return list(dict.fromkeys(line.lower() for line in lines))
