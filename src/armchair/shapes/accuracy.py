"""Whether a picture shows what a prompt says, and how often pictures do."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from armchair.errors import RequestError
from armchair.shapes.captions import Prompt, Wanted
from armchair.shapes.reader import read
from armchair.shapes.world import Object, Scene, relation_of

ATTRIBUTES = ("count", "forms", "colours", "sizes", "fills", "relations", "ground")
_MOST = 7  # objects considered when matching; pictures with more are wrong by count anyway


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What of a prompt a picture got right.

    forms, colours, sizes, fills and relations are true when right for every object (every relation) the
    prompt speaks of; None where it says nothing.  whole: the count and everything said is right.
    """

    whole: bool
    count: bool
    forms: bool
    colours: bool
    sizes: bool | None
    fills: bool | None
    relations: bool | None
    ground: bool | None


def judge(prompt: Prompt, image: Image.Image | np.ndarray) -> Verdict:
    """The verdict on an RGB picture (PIL, or uint8 (H, W, 3))."""
    return judge_scene(prompt, read(image))


def judge_scene(prompt: Prompt, scene: Scene) -> Verdict:
    """The verdict on a scene; its objects are assigned to the wanted ones so that most of it holds."""
    shown: list[Object | None] = [*scene.objects[:_MOST]]
    shown += [None] * (len(prompt.objects) - len(shown))
    tried = (_marks(prompt, chosen) for chosen in itertools.permutations(shown, len(prompt.objects)))
    marks = max(tried, key=lambda m: sum(map(sum, m.values())))
    said = {name: all(right) if right else None for name, right in marks.items()}
    count = len(scene.objects) == len(prompt.objects)
    ground = None if prompt.ground is None else scene.ground == prompt.ground
    whole = count and ground is not False and all(right is not False for right in said.values())
    return Verdict(
        whole=whole,
        count=count,
        forms=bool(said["forms"]),
        colours=bool(said["colours"]),
        sizes=said["sizes"],
        fills=said["fills"],
        relations=said["relations"],
        ground=ground,
    )


def _marks(prompt: Prompt, chosen: tuple[Object | None, ...]) -> dict[str, list[bool]]:
    """For each kind of statement, which of the statements hold of the chosen objects."""
    pairs: list[tuple[Wanted, Object | None]] = list(zip(prompt.objects, chosen, strict=True))
    neighbours = zip(prompt.relations, itertools.pairwise(chosen), strict=False)
    return {
        "forms": [o is not None and o.form == w.form for w, o in pairs],
        "colours": [o is not None and o.colour == w.colour for w, o in pairs],
        "sizes": [o is not None and o.size == w.size for w, o in pairs if w.size],
        "fills": [o is not None and o.fill == w.fill for w, o in pairs if w.fill],
        "relations": [
            a is not None and b is not None and relation_of(a, b) == relation
            for relation, (a, b) in neighbours
        ],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Shares over a number of verdicts.

    whole and shares[attribute] are in 0..1; interval is the 95 % Wilson interval of whole.  An attribute's
    share is among the prompts that speak of it, None when none did.
    """

    number: int
    whole: float
    interval: tuple[float, float]
    shares: dict[str, float | None]

    @classmethod
    def of(cls, verdicts: Iterable[Verdict]) -> "Accuracy":
        """The accuracy over one or more verdicts; RequestError on none."""
        verdicts = list(verdicts)
        if not verdicts:
            raise RequestError("no verdicts to take the accuracy of")
        right, number = sum(v.whole for v in verdicts), len(verdicts)
        shares: dict[str, float | None] = {}
        for name in ATTRIBUTES:
            said = [getattr(v, name) for v in verdicts if getattr(v, name) is not None]
            shares[name] = sum(said) / len(said) if said else None
        return cls(number=number, whole=right / number, interval=wilson(right, number), shares=shares)


def wilson(right: int, number: int) -> tuple[float, float]:
    """The 95 % Wilson score interval for `right` successes in `number` > 0 trials."""
    z = 1.959964
    share = right / number
    middle = share + z * z / (2 * number)
    reach = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    scale = 1 + z * z / number
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)
