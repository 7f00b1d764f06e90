import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armchair.data.loader import Order, Skips, batches, load_item, sample_weights, split
from armchair.data.sources import DataConfig, Sample
from armchair.errors import DataError, RequestError
from armchair.image.pixels import BrokenSample

CONFIG = DataConfig(resolution=8, flip=True)


class Memory:
    """A source of small pictures in memory, some of them broken."""

    def __init__(self, n: int, broken: tuple[int, ...] = (), fields=None) -> None:
        self.n = n
        self.broken = broken
        self.extra = fields or [{} for _ in range(n)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Sample:
        if i in self.broken:
            raise BrokenSample("damaged image")
        pixels = np.random.default_rng(i).integers(0, 256, (10, 12, 3), dtype=np.uint8)
        return Sample(pixels, tuple(self.fields(i)["caption"]))

    def key(self, i: int) -> str:
        return f"memory/{i}"

    def fields(self, i: int) -> dict:
        return {"caption": [f"picture {i}", f"number {i}"], **self.extra[i]}

    def fingerprint(self) -> str:
        return str(self.n)


def take(stream, count: int):
    out = list(itertools.islice(stream, count))
    stream.close()
    return out


def assert_same(one, other) -> None:
    assert [captions for _, captions in one] == [captions for _, captions in other]
    for (a, _), (b, _) in zip(one, other, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 5))
def test_each_epoch_is_a_permutation(n, seed, epoch):
    assert sorted(Order(n, seed).indices(epoch * n, n)) == list(range(n))


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 100), st.integers(0, 9), st.booleans())
def test_the_order_is_a_function_of_the_position(n, start, count, seed, weighted):
    what = np.random.default_rng(n).random(n) + 0.01 if weighted else n
    whole = Order(what, seed).indices(0, start + count)
    part = Order(what, seed).indices(start, count)
    assert part.dtype == np.int64 and part.shape == (count,)
    np.testing.assert_array_equal(part, whole[start:])


def test_epochs_and_seeds_differ():
    order = Order(100, 0)
    assert not np.array_equal(order.indices(0, 100), order.indices(100, 100))
    assert not np.array_equal(order.indices(0, 100), Order(100, 1).indices(0, 100))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=30).filter(any), st.integers(0, 999))
def test_weighted_visits_are_in_proportion(weights, seed):
    n, epochs = len(weights), 100
    shares = np.array(weights, float) / sum(weights)
    order = Order(np.array(weights, float), seed)
    visits = np.bincount(order.indices(0, n * epochs), minlength=n)
    assert np.abs(visits - shares * n * epochs).max() <= 4
    one = np.bincount(order.indices(n, n), minlength=n)
    assert np.all(np.abs(one - shares * n) < 1 + 1e-9)


@pytest.mark.parametrize("weights", [np.zeros(3), np.array([1.0, -1.0]), np.array([np.nan]), np.ones(0), 0])
def test_orders_of_nothing_are_refused(weights):
    with pytest.raises(RequestError):
        Order(weights, 0)


@settings(max_examples=15)
@given(
    st.integers(1, 30), st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(0, 9), st.integers(0, 4)
)
def test_ranks_are_disjoint_and_together_the_whole(n, world, local, seed, start_step):
    source, size = Memory(n), world * local
    whole = take(batches(source, CONFIG, batch_size=size, seed=seed, start_step=start_step), 3)
    parts = [take(batches(source, CONFIG, batch_size=size, seed=seed, start_step=start_step, rank=rank,
                          world=world), 3) for rank in range(world)]  # fmt: skip
    joined = [
        (torch.cat([part[k][0] for part in parts]), [c for part in parts for c in part[k][1]])
        for k in range(3)
    ]
    assert_same(whole, joined)
    assert whole[0][0].shape == (size, 3, 8, 8) and whole[0][0].dtype == torch.float32


@settings(max_examples=15)
@given(st.integers(101, 150), st.integers(1, 8), st.integers(0, 9), st.integers(1, 4), st.integers(1, 4))
def test_resuming_and_threads_change_nothing(n, start, seed, threads, prefetch):
    source = Memory(n, broken=(3,))
    through = take(batches(source, CONFIG, batch_size=4, seed=seed, threads=1, prefetch=1), start + 2)
    resumed = take(batches(source, CONFIG, batch_size=4, seed=seed, start_step=start, threads=threads,
                           prefetch=prefetch), 2)  # fmt: skip
    assert_same(through[start:], resumed)


def test_closing_stops_the_threads():
    before = threading.active_count()
    stream = batches(Memory(50), CONFIG, batch_size=16, seed=0, threads=3, prefetch=5)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


def test_broken_samples_are_replaced_named_once_and_counted(caplog):
    source, skips = Memory(200, broken=(7,)), Skips(200)
    stream = batches(source, CONFIG, batch_size=50, seed=0, skips=skips)
    seen = [caption for _, captions in take(stream, 12) for caption in captions]
    assert len(seen) == 600 and not any(caption.endswith(" 7") for caption in seen)
    assert skips.causes == {"damaged image": 1}
    assert caplog.text.count("memory/7") == 1


@pytest.mark.parametrize("n, broken", [(20, 1), (150, 2), (5000, 300)])
def test_more_than_one_percent_broken_stops(n, broken):
    source = Memory(n, broken=tuple(range(broken)))
    with pytest.raises(DataError, match=r"broken samples .* damaged image"):
        take(batches(source, CONFIG, batch_size=25, seed=0), 2 * n // 25)


def test_one_percent_broken_goes_on():
    take(batches(Memory(300, broken=(1, 2, 3)), CONFIG, batch_size=100, seed=0), 8)


def test_a_source_of_nothing_but_broken_samples_ends():
    source = Memory(30, broken=tuple(range(30)))
    with pytest.raises(DataError):
        load_item(source, 0, 0, CONFIG, 0)
    with pytest.raises(DataError):
        next(batches(source, CONFIG, batch_size=2, seed=0))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": 5, "world": 2}, {"rank": 1},
                                   {"threads": 0}, {"prefetch": 0}, {"order": Order(3, 0)}])  # fmt: skip
def test_wrong_requests_are_refused_at_the_call(wrong):
    with pytest.raises(RequestError):
        batches(Memory(9), CONFIG, **{"batch_size": 4, "seed": 0, **wrong})


def test_captions_follow_the_templates():
    source = Memory(4, fields=[{"tags": ["x", "y"]}] * 3 + [{}])
    config = DataConfig(resolution=8, crop="square", captions=("{caption}", "{caption}", "{tags}", ""))
    drawn = [load_item(source, 0, position, config, 0)[1] for position in range(800)]
    counts = {caption: drawn.count(caption) for caption in ["picture 0", "number 0", "x", "y", ""]}
    assert sum(counts.values()) == 800
    for caption, expected in {"picture 0": 200, "number 0": 200, "x": 100, "y": 100, "": 200}.items():
        assert abs(counts[caption] - expected) < 50
    assert {load_item(source, 3, position, config, 0)[1] for position in range(80)} == {
        "picture 3",
        "number 3",
        "",
    }
    only = DataConfig(resolution=8, captions=("{absent}",))
    with pytest.raises(DataError):
        next(batches(source, only, batch_size=2, seed=0))


def test_square_crops_do_not_vary():
    config = DataConfig(resolution=8, crop="square", flip=True)
    one, other = (load_item(Memory(3), 1, position, config, 0)[0] for position in (0, 5))
    np.testing.assert_array_equal(one, other)
    one, other = (load_item(Memory(3), 1, position, CONFIG, 0)[0] for position in (0, 5))
    assert not np.array_equal(one, other)


def test_weights_multiply_over_the_patterns_found():
    source = Memory(4, fields=[{"caption": [c]} for c in ("red cat", "red dog", "blue dog", "cow")])
    weights = sample_weights(source, DataConfig(weights={"red": 0.5, r"\bdog\b": 3.0}))
    np.testing.assert_allclose(weights / weights[3], [0.5, 1.5, 3.0, 1.0])
    assert weights.mean() == pytest.approx(1)
    assert sample_weights(source, DataConfig()) is None
    with pytest.raises(RequestError, match="factor 0"):
        sample_weights(source, DataConfig(weights={".": 0.0}))


def test_balance_visits_groups_by_the_root_of_their_size():
    fields = [{"style": "a"}] * 16 + [{"style": "b"}] * 4 + [{}]
    weights = sample_weights(Memory(21, fields=fields), DataConfig(balance="style"))
    assert weights[:16].sum() / weights[20] == pytest.approx(4)
    assert weights[16:20].sum() / weights[20] == pytest.approx(2)
    with pytest.raises(RequestError, match="did you mean 'style'"):
        sample_weights(Memory(21, fields=fields), DataConfig(balance="stile"))


@settings(max_examples=30)
@given(st.integers(1, 200), st.floats(0, 0.9))
def test_split_parts_the_source(n, fraction):
    source = Memory(n)
    train, val = split(source, fraction)
    keys = [view.key(i) for view in (train, val) for i in range(len(view))]
    assert sorted(keys) == sorted(source.key(i) for i in range(n))
    assert len(train) >= 1
    assert (len(val) >= 1) == (fraction > 0 and n > 1)


def test_split_keeps_its_sides_when_data_is_added():
    val = [
        {view.key(i) for i in range(len(view))} for view in (split(Memory(n), 0.1)[1] for n in (500, 1000))
    ]
    assert val[0] <= val[1] and 70 < len(val[1]) < 130


def test_subset_is_a_view():
    train, val = split(Memory(50), 0.2)
    assert val[0].captions == (f"picture {val.indices[0]}", f"number {val.indices[0]}")
    assert val.fields(0)["caption"][0] == val[0].captions[0]
    assert train.fingerprint() != val.fingerprint()
    for out_of_range in (-1, len(val)):
        with pytest.raises(IndexError):
            val[out_of_range]
    stream = batches(val, CONFIG, batch_size=len(val), seed=1)
    ((_, captions),) = take(stream, 1)
    assert sorted(int(c.split()[1]) for c in captions) == val.indices.tolist()
