"""Pictures that are decoded while the next are drawn."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from armchair.sample import pipeline
from armchair.sample.decoding import DecodingThread
from armchair.sample.generate import micro_batch_rows
from armchair.sample.pipeline import Artist, Drawing, load_artist
from conftest import write_tiny_bundle

PROMPT = "a red circle"


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def artist(tmp_path_factory: pytest.TempPathFactory) -> Artist:
    return load_artist(write_tiny_bundle(tmp_path_factory.mktemp("ranked") / "bundle", ranked=True), "cpu")


@pytest.fixture
def watched(artist: Artist, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads in which pictures were decoded, and how many were."""
    names: list[str] = []
    decode = Artist._decode

    def told(self: Artist, codes: np.ndarray) -> list:
        names.append(f"{threading.current_thread().name.split('_')[0]} {len(codes)} {torch.get_num_threads()}")
        return decode(self, codes)

    monkeypatch.setattr(Artist, "_decode", told)
    return names


def threads_now() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("decoding")]


def same(a: Drawing, b: Drawing) -> None:
    assert (a.codes == b.codes).all() and a.scores == b.scores and a.candidates == b.candidates
    assert [x.tobytes() for x in a.images] == [x.tobytes() for x in b.images]


@pytest.mark.parametrize("count", [17, 37])
def test_pictures_decoded_beside_the_drawing_are_the_same(artist, watched, two_threads, monkeypatch, count):
    size = micro_batch_rows(artist.decoder())
    sizes = [min(size, count - start) for start in range(0, count, size)]
    beside = artist.draw(PROMPT, candidates=count, seed=3)
    assert watched == [f"decoding {n} 1" for n in sizes]
    assert torch.get_num_threads() == 2 and not threads_now()
    monkeypatch.setattr(Artist, "_decodes_beside", lambda *_: False)
    watched.clear()
    same(beside, artist.draw(PROMPT, candidates=count, seed=3))
    assert watched == [f"MainThread {count} 2"]


def test_completed_halved_and_single_pictures_of_many_prompts_are_the_same_too(artist, two_threads, monkeypatch):
    def drawn() -> list[Drawing | list]:
        image = artist.draw(PROMPT, candidates=1).images[0]
        completed = artist.complete(image, PROMPT, candidates=18, redraw=(4, 8, 12, 16))
        halved = artist.draw(PROMPT, candidates=40, halve=True)
        return [completed, halved, artist.draw_each([PROMPT, "a blue square"] * 10)]

    beside = drawn()
    monkeypatch.setattr(pipeline, "DecodingThread", lambda _: pytest.fail("beside the drawing"))
    monkeypatch.setattr(Artist, "_decodes_beside", lambda *_: False)
    for a, b in zip(beside, drawn(), strict=True):
        if isinstance(a, Drawing):
            same(a, b)
        else:
            assert [x.tobytes() for x in a] == [x.tobytes() for x in b]


def test_one_batch_and_one_thread_go_without(artist, watched, two_threads):
    size = micro_batch_rows(artist.decoder())
    artist.draw(PROMPT, candidates=size)
    torch.set_num_threads(1)
    artist.draw(PROMPT, candidates=size + 1)
    assert watched == [f"MainThread {size} 2", f"MainThread {size + 1} 1"]


def test_what_goes_wrong_while_decoding_reaches_who_draws(artist, two_threads, monkeypatch):
    def fail(self: Artist, codes: np.ndarray) -> list:
        raise MemoryError(threading.current_thread().name)

    monkeypatch.setattr(Artist, "_decode", fail)
    with pytest.raises(MemoryError, match="decoding"):
        artist.draw(PROMPT, candidates=70)
    assert not threads_now() and torch.get_num_threads() == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_running_when_drawing_is_stopped(artist, watched, two_threads, error):
    def stop(done: int, count: int) -> None:
        if done > 32:
            raise error

    with pytest.raises(error):
        artist.draw(PROMPT, candidates=70, progress=stop)
    assert not threads_now() and torch.get_num_threads() == 2
    assert sum(int(name.split()[1]) for name in watched) < 70


def test_at_most_one_batch_waits_and_one_that_waits_is_given_up():
    go, decoding, taken = threading.Event(), threading.Event(), []

    def decode(codes: Tensor) -> list[int]:
        decoding.set()
        assert go.wait(20)
        return codes.tolist()

    def draw(thread: DecodingThread, count: int) -> None:
        for i in range(count):
            thread.take(torch.tensor([i]))
            taken.append(i)

    with DecodingThread(decode) as thread:
        drawing = threading.Thread(target=draw, args=(thread, 4))
        drawing.start()
        assert decoding.wait(20)
        drawing.join(0.3)
        assert taken == [0, 1] and drawing.is_alive()  # the third is not taken while the first is decoded
        go.set()
        drawing.join(20)
        assert taken == [0, 1, 2, 3] and thread.pictures() == [0, 1, 2, 3]
    assert not threads_now()

    go.clear()
    decoding.clear()
    with pytest.raises(KeyboardInterrupt), DecodingThread(decode) as thread:
        draw(thread, 2)
        decoding.wait(20)
        threading.Timer(0.1, go.set).start()
        raise KeyboardInterrupt
    assert not threads_now() and thread._batches[0].done() and thread._batches[1].cancelled()


def test_threads_that_start_meanwhile_have_as_many_of_their_own_as_before(two_threads):
    found: list[int] = []
    with DecodingThread(lambda codes: codes.tolist()) as thread:
        thread.take(torch.zeros(1))
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert found == [2]


def test_the_pictures_of_the_shipped_model_have_the_bits_of_one_thread_with_two(two_threads):
    artist = load_artist("emoji", "cpu")
    sizes = (8, artist.grid, artist.grid)
    codes = torch.randint(artist.image_tokenizer.codebook_size, sizes, generator=tiny.seeded()).numpy()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append([image.tobytes() for image in artist.decode(codes)])
    assert found[0] == found[1]
