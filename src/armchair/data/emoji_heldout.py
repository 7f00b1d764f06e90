"""Which pictures of the emoji set are learned from, which are measured on, and which are neither.

The zero-shot test is a fixed list of things in a style that no training picture shows: each part of each label is met
in training, the whole is not. Level `L` keeps the label from training in every style. Level `P` keeps it from training
in this style only, and in the style that is nearly the same.
"""

import hashlib
from typing import NamedTuple

from armchair.data.emoji_names import TONES

VAL_ONE_IN = 40


class HeldOut(NamedTuple):
    level: str  # L: the label in every style, P: the pair
    label: str
    style: str


# Pictures of one are nearly pictures of the other.
SIBLINGS = (("fluent color emoji", "fluent flat emoji"), ("noto emoji", "noto v1 emoji"))

HELDOUT = (
    HeldOut("L", "green square", "twemoji"),
    HeldOut("L", "blue heart", "noto emoji"),
    HeldOut("L", "red circle", "fluent flat emoji"),
    HeldOut("L", "yellow square", "fluent flat emoji"),
    HeldOut("L", "purple square", "fluent color emoji"),
    HeldOut("L", "black circle", "twemoji"),
    HeldOut("L", "five-thirty", "emojione v2 emoji"),
    HeldOut("L", "six-thirty", "fluent flat emoji"),
    HeldOut("L", "ten-thirty", "noto emoji"),
    HeldOut("L", "one o’clock", "fluent flat emoji"),
    HeldOut("L", "woman supervillain: medium-light skin tone", "noto emoji"),
    HeldOut("L", "man vampire: dark skin tone", "fluent flat emoji"),
    HeldOut("L", "man office worker: medium-dark skin tone", "fluent flat emoji"),
    HeldOut("L", "woman vampire: dark skin tone", "fluent color emoji"),
    HeldOut("L", "woman supervillain: dark skin tone", "fluent color emoji"),
    HeldOut("L", "man mage: dark skin tone", "fluent color emoji"),
    HeldOut("L", "man teacher: medium skin tone", "fluent flat emoji"),
    HeldOut("L", "man technologist: dark skin tone", "twemoji"),
    HeldOut("L", "man fairy: medium-dark skin tone", "fluent color emoji"),
    HeldOut("L", "man health worker", "noto emoji"),
    HeldOut("L", "woman mechanic", "noto emoji"),
    HeldOut("L", "woman technologist", "fluent color emoji"),
    HeldOut("L", "princess: medium-light skin tone", "noto emoji"),
    HeldOut("L", "selfie: medium skin tone", "fluent color emoji"),
    HeldOut("L", "leg: medium skin tone", "fluent color emoji"),
    HeldOut("L", "crying cat", "fluent flat emoji"),
    HeldOut("L", "pouting cat", "noto emoji"),
    HeldOut("P", "white heart", "noto emoji"),
    HeldOut("P", "orange heart", "fluent flat emoji"),
    HeldOut("P", "green heart", "emojione v2 emoji"),
    HeldOut("P", "brown heart", "fluent flat emoji"),
    HeldOut("P", "green circle", "twemoji"),
    HeldOut("P", "blue circle", "fluent flat emoji"),
    HeldOut("P", "orange square", "noto emoji"),
    HeldOut("P", "eight o’clock", "noto emoji"),
    HeldOut("P", "three o’clock", "twemoji"),
    HeldOut("P", "two o’clock", "emojione v2 emoji"),
    HeldOut("P", "man cook: light skin tone", "noto emoji"),
    HeldOut("P", "man mechanic: dark skin tone", "fluent color emoji"),
    HeldOut("P", "woman astronaut: medium-dark skin tone", "fluent flat emoji"),
    HeldOut("P", "man vampire: medium skin tone", "fluent flat emoji"),
    HeldOut("P", "man office worker: medium skin tone", "fluent color emoji"),
    HeldOut("P", "woman scientist: medium-dark skin tone", "fluent color emoji"),
    HeldOut("P", "woman scientist: dark skin tone", "noto emoji"),
    HeldOut("P", "woman cook: medium-dark skin tone", "twemoji"),
    HeldOut("P", "man student", "noto emoji"),
    HeldOut("P", "man astronaut", "fluent flat emoji"),
    HeldOut("P", "woman firefighter", "noto emoji"),
    HeldOut("P", "man singer", "twemoji"),
    HeldOut("P", "man cook", "fluent color emoji"),
    HeldOut("P", "factory worker: dark skin tone", "fluent color emoji"),
    HeldOut("P", "student: dark skin tone", "twemoji"),
    HeldOut("P", "clapping hands: medium-light skin tone", "emojione v2 emoji"),
    HeldOut("P", "grinning cat", "fluent color emoji"),
)

_PAIRS = {(held.label, held.style) for held in HELDOUT}
# A person of a profession is kept from training in every skin tone: `woman mechanic` is in the picture of each.
_PEOPLE = ("man ", "woman ")
_LABELS = {held.label for held in HELDOUT if held.level == "L"} | {
    f"{held.label}: {tone} skin tone"
    for held in HELDOUT
    if held.level == "L" and held.label.startswith(_PEOPLE) and ": " not in held.label
    for tone in TONES
}
_NEAR = {
    (held.label, style) for held in HELDOUT for siblings in SIBLINGS if held.style in siblings for style in siblings
}


def split_of(key: str, label: str, style: str) -> str | None:
    """`train`, `val` or `heldout`; None for a picture that would give a held-out one away and is in none.

    One in 40 of what may be learned from is `val`, by the hash of its key.
    """
    if (label, style) in _PAIRS:
        return "heldout"
    if label in _LABELS or (label, style) in _NEAR:
        return None
    return "val" if int(hashlib.sha256(f"v{key}".encode()).hexdigest(), 16) % VAL_ONE_IN == 0 else "train"
