"""What the emoji model never sees."""

from collections import Counter

from armchair.data.emoji import PACKAGES
from armchair.data.emoji_heldout import HELDOUT, split_of


def test_the_list_is_of_pairs_that_can_be():
    assert len(set(HELDOUT)) == len(HELDOUT) == 54
    assert {held.style for held in HELDOUT} <= {package.style for package in PACKAGES}
    assert Counter(held.level for held in HELDOUT) == {"L": 27, "P": 27}


def test_held_out_pairs_are_held_out_whatever_their_key():
    assert all({split_of(str(i), held.label, held.style) for i in range(50)} == {"heldout"} for held in HELDOUT)


def test_what_would_give_a_pair_away_is_nowhere():
    def splits(label, style):
        return {split_of(str(i), label, style) for i in range(200)}

    assert splits("blue heart", "twemoji") == {None}  # L: in every style
    assert splits("woman mechanic: dark skin tone", "streamline emoji") == {None}  # and in every skin tone
    assert splits("woman vampire", "twemoji") == {"train", "val"}  # of `woman vampire: dark skin tone`, only that
    assert splits("white heart", "noto v1 emoji") == {None}  # P: in the style that is nearly the same
    assert splits("white heart", "twemoji") == {"train", "val"}
    assert splits("brown heart", "fluent color emoji") == {None}
    assert splits("red heart", "noto emoji") == {"train", "val"}


def test_one_in_forty_is_for_validation_by_the_key_alone():
    splits = [split_of(f"noto-{i:05d}", "red heart", "noto emoji") for i in range(20_000)]
    assert splits == [split_of(f"noto-{i:05d}", "dog", "twemoji") for i in range(20_000)]
    assert 430 < splits.count("val") < 570 and set(splits) == {"train", "val"}
