"""Names of icons to what they show, and wordings of captions."""

import itertools

import pytest

from armchair.data.emoji_names import SHORT_WORDS, Meaning, Names, caption_lines, own_name, read_names, slug
from tiny_icons import icon_sets

EXTRA = ("flag: Côte d’Ivoire", "keycap: #", "A button (blood type)", "flag: St. Lucia", "three o’clock", "green heart")


@pytest.fixture(scope="module")
def names():
    files = icon_sets()["emojibase-data"]
    more = [{"label": label, "hexcode": f"1F0{i}", "group": 0} for i, label in enumerate(EXTRA)]
    files["en/data.json"] = [*files["en/data.json"], *more, {"label": "regional indicator F", "hexcode": "1F1EB"}]
    return read_names(files.get, [{"old-apple": "1f34e-fe0f", "clapping-hands": "1F34E"}, {"old-apple": "1F499"}])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flag: Côte d’Ivoire", "flag-cote-divoire"),
        ("Heard & McDonald Islands", "heard-and-mcdonald-islands"),
        ("U.S. Virgin Islands", "us-virgin-islands"),
        ("keycap: *", "keycap-*"),
        ("woman’s boot", "womans-boot"),
    ],
)
def test_slugs(text, expected):
    assert slug(text) == expected


@pytest.mark.parametrize(
    ("icon", "hexcode", "label"),
    [
        ("anything", "1f34e-fe0f", "red apple"),  # the code points decide
        ("red-apple", "1FFFF", "red apple"),  # of none that is known: its own name
        ("red-apple", None, "red apple"),
        ("red-apple-2", None, "red apple"),
        ("old-apple", None, "red apple"),  # the set that is trusted more
        ("clapping-hands", None, "clapping hands"),  # a label before any list
        ("clap", None, "clapping hands"),
        ("red-apple-of-a-big-tree", None, "red apple"),
        ("woman-mechanic-dark", None, "woman mechanic: dark skin tone"),
        ("flag-for-france", None, "flag: France"),
        ("flag-for-flag-cote-divoire", None, "flag: Côte d’Ivoire"),
        ("flag-for-st-lucia", None, "flag: St. Lucia"),
        ("keycap-#", None, "keycap: #"),
        ("a-button", None, "A button (blood type)"),
        ("letter-f", None, "regional indicator F"),
        ("unheard-of-thing-3", None, "unheard of thing"),
        ("2", None, "2"),
    ],
)
def test_an_icon_is_found_by_any_of_its_names(names, icon, hexcode, label):
    assert names.find(icon, hexcode, "kind", "noto", squeezed=False).label == label


@pytest.mark.parametrize(
    ("icon", "label"),
    [
        ("redapple", "red apple"),
        ("clock3oclock", "three o’clock"),
        ("heartgreen", "green heart"),
        ("bigredtree", "big red tree"),
        ("appleofheart", "apple of heart"),
        ("red-ripe", "red ripe"),
        ("redzzz", None),
        ("aa", None),
    ],
)
def test_names_that_are_run_together(names, icon, label):
    found = names.find(icon, None, "kind", "fxemoji", squeezed=True)
    assert label is None if found is None else found.label == label


def test_what_the_cldr_does_not_know_has_the_sets_own_kind(names):
    assert names.find("clap", None, "kind", "noto", False).group == "all things"
    assert names.find("letter-f", None, "kind", "noto", False).group == "kind"
    unknown = names.find("widget", "1FFFF-FE0F", "kind", "noto", False)
    assert unknown == Meaning("widget", (), "kind", "", "1FFFF")


def parted(text, words):
    """Every way to part `text`, literally."""
    if not text:
        return [[]]
    starts = [text[:n] for n in range(1, len(text) + 1) if text[:n] in words]
    return [[word, *rest] for word in starts for rest in parted(text[len(word) :], words)]


def test_names_are_parted_into_as_few_words_as_do_and_the_longer_ones():
    words = {"one", "ones", "sun", "set", "sunset", "tone", "net", "and", "sand", "up", "upset"}
    names = Names(meanings={}, hexcodes={}, words=frozenset(words))
    for chosen in itertools.product(sorted(words), repeat=3):
        text = "".join(chosen)
        ways = parted(text, words | set(SHORT_WORDS))
        best = min((len(way), -sum(len(word) ** 2 for word in way)) for way in ways)
        found = names._part(text).split()
        assert found in ways and (len(found), -sum(len(word) ** 2 for word in found)) == best
    assert names._part("upssun") is None


def test_captions():
    apple = Meaning("Red Apple", ("apple", "fruit", "red", "ripe"), "food & drink", "fruit", "1F34E")
    first, label, manner, kind, tags = caption_lines(apple, "twemoji", "flat style", "twemoji-00001")
    assert (first, label, manner) == ("red apple, twemoji", "red apple", "red apple, flat style")
    assert kind == "red apple, fruit" and tags in {" ".join(c) for c in itertools.combinations(apple.tags, 3)}
    assert caption_lines(apple, "twemoji", "flat style", "twemoji-00001")[-1] == tags
    assert len({caption_lines(apple, "twemoji", "flat style", str(i))[-1] for i in range(20)}) == 4
    assert caption_lines(Meaning("red exclamation mark", ("!", "mark")), "twemoji", "flat style", "x")[-1] == "mark"
    assert caption_lines(Meaning("webcam"), "flat color icon", "flat style", "x") == [
        "webcam, flat color icon", "webcam", "webcam, flat style",
    ]  # fmt: skip


def test_an_icons_own_name():
    assert own_name("accept-database-12") == "accept database" and own_name("2") == "2"
