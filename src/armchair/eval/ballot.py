"""Human preference, best of five, as in the paper (section 3, figure 7): the ballot, its store and its result.

Two systems drew each caption. Whoever votes sees both drawings side by side, not told which is whose, and answers two
questions. Each pair is judged by five; a system wins a pair by a majority of them.
"""

import contextlib
import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from armchair.errors import RequestError
from armchair.eval.figures import Picture, mean_figure
from armchair.runtime import stream_seed

QUESTIONS = {"realistic": "Which picture is more realistic?", "caption": "Which picture matches the caption better?"}
CHOICES = ("left", "right", "tie")
VOTES = 5  # a pair
CHECK_EVERY = 8  # pairs, of which one has a known answer
MAX_MISSED = 1 / 3  # of the checks; whoever misses more is not counted
FORMAT = 1
MADE_OF = "made of"  # the row of `about` with what decides about the pictures, as JSON

_SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE pairs (
    id INTEGER PRIMARY KEY, caption TEXT NOT NULL, a BLOB NOT NULL, b BLOB NOT NULL, is_check INTEGER NOT NULL
);
CREATE TABLE votes (
    pair INTEGER NOT NULL REFERENCES pairs (id), question TEXT NOT NULL, voter TEXT NOT NULL,
    choice TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (pair, question, voter)
);
"""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a voter is shown next."""

    pair: int
    caption: str
    done: int  # pairs that this voter has answered
    open: int  # pairs that still want votes of this voter


class Ballot:
    """A vote on disk: one SQLite file, safe to be stopped at any moment and to be used by several voters at once."""

    def __init__(self, path: Path):
        """Open one that `create` made. Raises RequestError for another file."""
        if not path.is_file():
            raise RequestError(f"no ballot at {path}")
        self.path = path
        try:
            with self._store() as store:
                self.about = dict(store.execute("SELECT name, value FROM about"))
        except sqlite3.DatabaseError as error:
            raise RequestError(f"{path}: not a ballot: {error}") from None
        if self.about.get("format") != str(FORMAT):
            raise RequestError(f"{path}: a ballot of format {self.about.get('format')}, this armchair has {FORMAT}")
        self.made_of: dict[str, str] = json.loads(self.about.get(MADE_OF, "{}"))

    @classmethod
    def create(
        cls,
        path: Path,
        systems: tuple[str, str],
        captions: Sequence[str],
        first: Sequence[Image.Image],
        second: Sequence[Image.Image],
        *,
        seed: int = 0,
        made_of: Mapping[str, str] | None = None,
    ) -> "Ballot":
        """A new ballot on two drawings a caption. One pair in eight is a check: a drawing beside its own pixels in
        disorder, where the answer to both questions is known.

        made_of: what decides about the pictures, by name; `check_made_of` compares with it. Raises RequestError where
        `path` is there already, or the numbers differ.
        """
        if path.exists():
            raise RequestError(f"{path} is there already: it has people's votes")
        if not len(captions) == len(first) == len(second) or not captions:
            raise RequestError("a ballot needs as many drawings of either system as captions, and one at least")
        rng = np.random.Generator(np.random.PCG64(stream_seed(seed, "ballot checks")))
        pairs = []
        for i, (caption, a, b) in enumerate(zip(captions, first, second, strict=True)):
            if i % (CHECK_EVERY - 1) == CHECK_EVERY // 2:
                pairs.append((caption, _png(a), _png(_disordered(a, rng)), 1))
            pairs.append((caption, _png(a), _png(b), 0))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.new")
        partial.unlink(missing_ok=True)
        about = {"format": FORMAT, "first": systems[0], "second": systems[1], "seed": seed}
        about[MADE_OF] = json.dumps(dict(made_of or {}))
        with contextlib.closing(sqlite3.connect(partial)) as store, store:
            store.executescript(_SCHEMA)
            store.executemany("INSERT INTO about VALUES (?, ?)", [(k, str(v)) for k, v in about.items()])
            store.executemany("INSERT INTO pairs (caption, a, b, is_check) VALUES (?, ?, ?, ?)", pairs)
        partial.replace(path)
        return cls(path)

    def check_made_of(self, wanted: Mapping[str, str]) -> None:
        """Raises RequestError, which names what differs, where the ballot was not made of what is `wanted`.

        Votes on pictures of one system would otherwise be counted for another.
        """
        if not self.made_of:
            raise RequestError(f"{self.path} does not say which pictures it has: choose another --report")
        names = dict.fromkeys([*self.made_of, *wanted])
        other = [name for name in names if self.made_of.get(name) != wanted.get(name)]
        if other:
            told = [f"{name}: {self.made_of.get(name, 'none')} there, {wanted.get(name, 'none')} now" for name in other]
            raise RequestError(f"{self.path} has votes on other pictures ({'; '.join(told)}): choose another --report")

    def next(self, voter: str) -> Ask | None:
        """The pair with the fewest votes among those that want more and that this voter has not judged, or None.

        Checks come to every voter. Among pairs with equally many votes, each voter has an order of their own.
        """
        with self._store() as store:
            rows = store.execute(
                "SELECT id, caption, is_check, (SELECT COUNT(DISTINCT voter) FROM votes WHERE pair = id), "
                "(SELECT COUNT(*) FROM votes WHERE pair = id AND voter = ?) FROM pairs",
                (voter,),
            ).fetchall()
        done = sum(mine == len(QUESTIONS) for *_, mine in rows)
        # A pair that this voter has begun is finished even if others have filled it meanwhile.
        wanted = [row for row in rows if row[4] < len(QUESTIONS) and (row[2] or row[4] or row[3] < VOTES)]
        if not wanted:
            return None

        def order(row: tuple) -> tuple:
            return not row[4], 0 if row[2] else row[3], self._draw(voter, row[0])

        pair, caption, *_ = min(wanted, key=order)
        return Ask(pair=pair, caption=caption, done=done, open=len(wanted))

    def picture(self, pair: int, side: str, voter: str) -> bytes:
        """The PNG on a side, as this voter sees it. Raises RequestError for a pair or side that there is not."""
        if side not in ("left", "right"):
            raise RequestError(f"side: expected left or right, got {side!r}")
        column = "a" if (side == "left") == self._first_is_left(voter, pair) else "b"
        with self._store() as store:
            row = store.execute(f"SELECT {column} FROM pairs WHERE id = ?", (pair,)).fetchone()
        if row is None:
            raise RequestError(f"there is no pair {pair}")
        return bytes(row[0])

    def vote(self, pair: int, voter: str, question: str, choice: str) -> None:
        """Record an answer; a second one of the same voter takes the first one's place.

        Raises RequestError for what is no question, no choice or no pair.
        """
        if question not in QUESTIONS or choice not in CHOICES:
            raise RequestError(f"expected a question of {list(QUESTIONS)} and a choice of {list(CHOICES)}")
        if choice != "tie":
            choice = "first" if (choice == "left") == self._first_is_left(voter, pair) else "second"
        with self._store() as store:
            if store.execute("SELECT 1 FROM pairs WHERE id = ?", (pair,)).fetchone() is None:
                raise RequestError(f"there is no pair {pair}")
            store.execute("REPLACE INTO votes VALUES (?, ?, ?, ?, ?)", (pair, question, voter, choice, time.time()))

    def results(self) -> dict[str, Any]:
        """Votes counted, as JSON data.

        For each question: `pairs` decided by five votes or more; how many of them `first`, `second` and `tie` have by
        the most votes (a draw of votes is a tie); `first_share`, the share of `first` among pairs that somebody won,
        with its interval over pairs; `unanimous`; `alpha`, Krippendorff's of all votes (1 agreement, 0 chance).
        `voters` who missed more than a third of their checks are left out and counted.
        """
        with self._store() as store:
            votes = store.execute(
                "SELECT pair, question, voter, choice, is_check FROM votes JOIN pairs ON pair = id"
            ).fetchall()
            pairs = store.execute("SELECT COUNT(*) FROM pairs WHERE NOT is_check").fetchone()[0]
        left_out = _careless(votes)
        counted = [v for v in votes if v[2] not in left_out and not v[4]]
        found: dict[str, Any] = {
            "first": self.about["first"],
            "second": self.about["second"],
            "pairs": pairs,
            "voters": len({v[2] for v in votes}),
            "voters_left_out": len(left_out),
            "questions": {},
        }
        for question in QUESTIONS:
            found["questions"][question] = _counted([(v[0], v[2], v[3]) for v in counted if v[1] == question])
        return found

    def _first_is_left(self, voter: str, pair: int) -> bool:
        return self._draw(voter, pair, "side") % 2 == 0

    def _draw(self, voter: str, pair: int, what: str = "order") -> int:
        return stream_seed(int(self.about["seed"]), "ballot", what, voter, pair)

    @contextlib.contextmanager
    def _store(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.path, timeout=30)) as store, store:
            yield store


def results_plot(results: dict[str, Any]) -> Picture:
    """Shares of pairs that each system won by a majority, one bar a question."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6.5, 2.2), dpi=110, layout="constrained")
    axes = canvas.add_subplot()
    told = []
    for y, (question, found) in enumerate(results["questions"].items()):
        left = 0.0
        for who, colour in (("first", "#3b6fb6"), ("tie", "#b8b8b8"), ("second", "#d98032")):
            share = found[who] / found["pairs"] if found["pairs"] else 0.0
            axes.barh(y, share, left=left, color=colour, label=results.get(who, "tie") if y == 0 else None)
            if share > 0.05:
                axes.text(left + share / 2, y, f"{share:.0%}", ha="center", va="center")
            left += share
        told.append(f"{question}: {found['first']} to {found['second']}, {found['tie']} ties")
    axes.set(yticks=range(len(QUESTIONS)), yticklabels=list(QUESTIONS.values()), xlim=(0, 1), xlabel="share of pairs")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    alt = f"{results['first']} against {results['second']}. " + "; ".join(told)
    return Picture.of_plot("ballot", canvas, alt)


def _careless(votes: Sequence[tuple]) -> set[str]:
    asked: Counter[str] = Counter(v[2] for v in votes if v[4])
    missed: Counter[str] = Counter(v[2] for v in votes if v[4] and v[3] != "first")
    return {voter for voter, n in asked.items() if missed[voter] > MAX_MISSED * n}


def _counted(votes: Sequence[tuple[int, str, str]]) -> dict[str, Any]:
    by_pair: dict[int, Counter[str]] = {}
    for pair, _, choice in votes:
        by_pair.setdefault(pair, Counter())[choice] += 1
    decided = {pair: _winner(c) for pair, c in by_pair.items() if c.total() >= VOTES}
    tally = Counter(decided.values())
    won = np.array([w == "first" for w in decided.values() if w != "tie"], dtype=float)
    share = None
    if len(won):
        share = mean_figure(won)
    return {
        "pairs": len(decided),
        "votes": len(votes),
        **{who: tally[who] for who in ("first", "second", "tie")},
        "first_share": None if share is None else share.to_json(),
        "unanimous": sum(len(by_pair[pair]) == 1 for pair in decided),
        "alpha": _alpha(votes),
    }


def _winner(votes: Counter[str]) -> str:
    """Who has the most votes of a pair; a draw is a tie."""
    (best, most), *rest = votes.most_common()
    return "tie" if any(n == most for _, n in rest) else best


def _alpha(votes: Sequence[tuple[int, str, str]]) -> float | None:
    """Krippendorff's alpha for nominal data; None where there is nothing to agree on."""
    try:
        import krippendorff
    except ImportError:
        raise RequestError("a ballot needs more packages: pip install 'armchair[evaluate]'") from None
    pairs, voters = sorted({v[0] for v in votes}), sorted({v[1] for v in votes})
    counts = np.zeros((len(pairs), 3), dtype=int)
    for pair, _, choice in votes:
        counts[pairs.index(pair), ("first", "second", "tie").index(choice)] += 1
    if len(voters) < 2 or (counts.sum(0) > 0).sum() < 2 or (counts.sum(1) > 1).sum() == 0:
        return None
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def _disordered(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image.convert("RGB"))
    return Image.fromarray(rng.permutation(pixels.reshape(-1, 3)).reshape(pixels.shape))


def _png(image: Image.Image) -> bytes:
    return Picture.of("", image, "").png
