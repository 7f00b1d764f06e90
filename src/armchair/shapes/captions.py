"""Wordings of a scene, and prompts: a wording together with exactly what it asks for."""

from dataclasses import dataclass

from armchair.errors import RequestError
from armchair.shapes.world import CONVERSE, COUNTS, SPLITS, Object, Scene, known, scene


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a text says of one object; None leaves the attribute free."""

    form: str
    colour: str
    size: str | None = None
    fill: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and what it says: relations[i] relates objects[i] to objects[i + 1].

    relations is empty when the text only lists the objects; ground is None when the text does not name it.
    """

    text: str
    objects: tuple[Wanted, ...]
    relations: tuple[str, ...]
    ground: str | None


def captions(scene: Scene) -> tuple[str, ...]:
    """All wordings of a scene of 1-3 objects, lower case, always in the same order."""
    return tuple(prompt.text for prompt in wordings(scene))


def wordings(scene: Scene) -> tuple[Prompt, ...]:
    """The captions of a scene as prompts.

    Every wording says form and colour of every object.  Of size and fill, the terse ones say nothing, the
    natural ones only what is not medium or solid, the full ones everything.
    """
    return tuple(dict.fromkeys(_wordings(scene)))  # terse, natural and full may coincide


def _wordings(scene: Scene) -> tuple[Prompt, ...]:
    terse = [Wanted(o.form, o.colour) for o in scene.objects]
    natural = [_natural(o) for o in scene.objects]
    full = [Wanted(o.form, o.colour, o.size, o.fill) for o in scene.objects]
    ground = scene.ground
    if len(scene.objects) == 1:
        (t,), (n,), (f,) = terse, natural, full
        said = (
            (_noun(t), t, None),
            (_noun(n), n, None),
            (_noun(f), f, None),
            (f"there is {_noun(n)}", n, None),
            (f"{_noun(t)} on a {ground} ground", t, ground),
            (f"{_noun(n)} on a {ground} ground", n, ground),
            (f"{_noun(f)} on a {ground} ground", f, ground),
            (f"a {ground} ground with {_noun(n)}", n, ground),
        )
        return tuple(Prompt(text, (wanted,), (), where) for text, wanted, where in said)
    if len(scene.objects) == 2:
        return _two(scene, terse, natural, full)
    return _three(scene, terse, natural, full)


def _two(scene: Scene, terse: list[Wanted], natural: list[Wanted], full: list[Wanted]) -> tuple[Prompt, ...]:
    (relation,), ground = scene.relations, scene.ground
    on = f" on a {ground} ground"

    def straight(text: str, wants: list[Wanted], where: str | None = None) -> Prompt:
        return Prompt(text, tuple(wants), (relation,), where)

    def turned(wants: list[Wanted], tail: str = "", where: str | None = None) -> Prompt:
        a, b = wants
        if relation == "inside":  # still says that a is inside b
            return straight(f"{_noun(b)} with {_noun(a)} inside{tail}", wants, where)
        converse = CONVERSE[relation]
        return Prompt(f"{_noun(b)} {converse} {_noun(a)}{tail}", (b, a), (converse,), where)

    return (
        straight(_chain(terse, scene), terse),
        straight(_chain(natural, scene), natural),
        straight(_chain(full, scene), full),
        turned(terse),
        turned(natural),
        turned(full, on, ground),
        straight(f"there is {_chain(natural, scene)}", natural),
        straight(_chain(natural, scene) + on, natural, ground),
        straight(_chain(full, scene) + on, full, ground),
        straight(f"a {ground} ground with {_chain(terse, scene)}", terse, ground),
        Prompt(f"{_noun(natural[0])} and {_noun(natural[1])}{on}", tuple(natural), (), ground),
    )


def _three(
    scene: Scene, terse: list[Wanted], natural: list[Wanted], full: list[Wanted]
) -> tuple[Prompt, ...]:
    ground = scene.ground
    on = f" on a {ground} ground"
    a, b, c = map(_noun, natural)
    return (
        Prompt(_chain(terse, scene), tuple(terse), scene.relations, None),
        Prompt(_chain(natural, scene), tuple(natural), scene.relations, None),
        Prompt(_chain(full, scene), tuple(full), scene.relations, None),
        Prompt(_chain(terse, scene) + on, tuple(terse), scene.relations, ground),
        Prompt(_chain(natural, scene) + on, tuple(natural), scene.relations, ground),
        Prompt(f"{a} and {b} and {c}", tuple(natural), (), None),
    )


def _natural(o: Object) -> Wanted:
    return Wanted(
        o.form, o.colour, None if o.size == "medium" else o.size, None if o.fill == "solid" else o.fill
    )


def _noun(want: Wanted) -> str:
    words = " ".join(word for word in (want.size, want.colour, want.fill, want.form) if word)
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _chain(wants: list[Wanted], scene: Scene) -> str:
    """'A left of B', and for three 'A left of B which is above C'."""
    text = _noun(wants[0])
    for i, relation in enumerate(scene.relations):
        text += f"{' which is' if i else ''} {relation} {_noun(wants[i + 1])}"
    return text


def prompts(n: int, *, split: str = "val", objects: int | None = None, seed: int = 0) -> list[Prompt]:
    """n prompts; prompt i words scene(i, seed=seed, split=split, objects=objects).

    The wordings that state all relations are used in turn.  RequestError: as `scene`, or n < 0.
    """
    known("split", split, SPLITS)
    if n < 0:
        raise RequestError(f"n must be >= 0, got {n}")
    if objects is not None and objects not in COUNTS[split]:
        raise RequestError(f"split {split!r} has scenes of {COUNTS[split]} objects, not {objects}")
    chosen = []
    for i in range(n):
        drawn = scene(i, seed=seed, split=split, objects=objects)
        said = [p for p in wordings(drawn) if len(p.relations) == len(drawn.relations)]
        chosen.append(said[i % len(said)])
    return chosen
