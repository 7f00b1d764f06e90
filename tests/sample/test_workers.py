"""Batches of a drawing by several threads."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from armchair.sample import generate, native
from armchair.sample.engine import Engine
from armchair.sample.generate import candidate_uniforms, draw_codes, micro_batches
from armchair.sample.next_token import Settings
from armchair.sample.pipeline import Artist, Drawing, load_artist
from armchair.sample.workers import in_order
from conftest import write_tiny_bundle

PROMPT = "a red circle"
STREAM = tiny.shape(grid=4, text_length=4, codebook=40)

needs_the_library = pytest.mark.skipif(
    native.library() is None, reason="the compiled step was not built here, or is not for this processor"
)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def artist(tmp_path_factory: pytest.TempPathFactory) -> Artist:
    folder = tmp_path_factory.mktemp("ranked") / "bundle"
    return load_artist(write_tiny_bundle(folder, ranked=True), "cpu")


@pytest.fixture
def threads_used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the threads in which codes are drawn, how many threads each of them has, and by how many steps are
    shared."""
    names: set[str] = set()
    draw = generate.draw_micro_batch

    def told(decoder: generate.Decoder, batch: generate.MicroBatch, threads: int = 1) -> Iterator[torch.Tensor]:
        own = f"{threading.current_thread().name.split('_')[0]} {torch.get_num_threads()}"
        names.add(own if threads == 1 else f"{own} shared by {threads}")
        return draw(decoder, batch, threads)

    monkeypatch.setattr(generate, "draw_micro_batch", told)
    return names


def nothing_is_left() -> bool:
    return torch.get_num_threads() == 2 and not [t for t in threading.enumerate() if t.name.startswith("drawing")]


@given(count=st.integers(1, 300), most=st.integers(1, 40), threads=st.integers(1, 9))
def test_batches_are_equal_and_keep_every_thread_busy(count, most, threads):
    batches = micro_batches(count, most, threads)
    assert [i for batch in batches for i in batch] == list(range(count))
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1 and min(sizes) > 0
    assert len(batches) % threads == 0 or max(sizes) <= 3
    assert min(sizes) > 1 or count == 1 or most <= 2


@needs_the_library
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_codes_are_the_same_with_any_number_of_threads(guidance, threads_used):
    engine = Engine(tiny.prior(STREAM, "full", "row", width=64), "int8")
    assert engine.independent_threads
    text, uniforms = tiny.texts(3, STREAM), candidate_uniforms(5, range(37), 16)
    for count in (1, 2, 3, 16, 17, 37):
        rows = [i % 3 for i in range(count)]
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            threads_used.clear()
            found.append(draw_codes(engine, text, rows, uniforms[:count], Settings(guidance=guidance)))
            alone = "MainThread 1" if threads == 1 else f"MainThread {threads} shared by {threads}"
            assert threads_used == {"drawing 1" if min(threads, count // 2) > 1 else alone}
            assert torch.get_num_threads() == threads
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_the_library
def test_completed_halved_and_many_prompts_pictures_are_the_same_too(artist, threads_used, monkeypatch):
    def drawn() -> list[Drawing]:
        image = artist.draw(PROMPT, candidates=1).images[0]
        completed = artist.complete(image, PROMPT, candidates=18, redraw=(4, 8, 12, 16))
        return [completed, artist.draw(PROMPT, candidates=40, halve=True)]

    prompts = [PROMPT, "a blue square"] * 10
    by_two, each_by_two = drawn(), artist.draw_each(prompts)
    assert "drawing 1" in threads_used
    threads_used.clear()
    monkeypatch.setattr(Engine, "independent_threads", False)
    for a, b in zip(by_two, drawn(), strict=True):
        assert (a.codes == b.codes).all() and a.candidates == b.candidates
        assert [x.tobytes() for x in a.images] == [x.tobytes() for x in b.images]
    assert [x.tobytes() for x in each_by_two] == [x.tobytes() for x in artist.draw_each(prompts)]
    assert threads_used == {"MainThread 2"}


@needs_the_library
def test_a_picture_that_is_shown_as_it_grows_is_shared_too(artist, monkeypatch):
    shared_by = []
    sharing = generate.sharing
    monkeypatch.setattr(generate, "sharing", lambda threads: shared_by.append(threads) or sharing(threads))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        shown = []
        for picture in artist.draw_stream(PROMPT):
            assert torch.get_num_threads() == threads  # between steps all is the caller's
            shown.append(picture.codes if isinstance(picture, Drawing) else picture.tobytes())
        found.append(shown)
        assert set(shared_by) == {threads}
        shared_by.clear()
    *_, last = found[0]
    assert all(other[-2] == found[0][-2] and (other[-1] == last).all() for other in found)


def test_what_has_other_bits_with_more_threads_is_drawn_by_the_caller(threads_used):
    model = tiny.prior(STREAM, "full", width=32)
    for decoder in (model, Engine(model, "fp32")):
        draw_codes(decoder, tiny.texts(1, STREAM), [0] * 20, candidate_uniforms(0, range(20), 16), Settings())
    assert threads_used == {"MainThread 2"}


@needs_the_library
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_running_when_drawing_is_stopped(artist, error):
    told = []

    def stop(done: int, count: int) -> None:
        told.append(done)
        if done > 20:
            raise error

    with pytest.raises(error):
        artist.draw(PROMPT, candidates=70, progress=stop)
    assert nothing_is_left() and told == sorted(told) and told[-1] < 70


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "AVX512", reason="micro-batches of eight do there")
def test_pixels_and_scores_are_the_same_with_any_number_of_threads_and_pictures(artist):
    codes = artist.draw(PROMPT, candidates=5).codes
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in (1, 2, 5):
            images = artist.decode(codes[:count])
            scores = artist.rank(images, PROMPT)
            found.append([(image.tobytes(), score) for image, score in zip(images, scores, strict=True)])
            assert torch.get_num_threads() == threads
    assert all(pictures == found[-1][: len(pictures)] for pictures in found)


def test_a_single_piece_is_computed_alone_too():
    def work(piece: int, stop: threading.Event) -> tuple[str, int]:
        return threading.current_thread().name.split("_")[0], torch.get_num_threads()

    assert list(in_order(work, [0], 2)) == [("drawing", 1)]
    assert list(in_order(work, [0], 1)) == [("MainThread", 2)]
    assert list(in_order(work, [], 2)) == [] and nothing_is_left()


def test_a_thread_that_wakes_when_all_is_done_keeps_nobody_waiting(monkeypatch, caplog):
    class Late(threading.Barrier):
        def wait(self, timeout: float | None = None) -> int:
            place = super().wait(timeout)
            if threading.current_thread().name == "drawing_1":
                while not self.broken:
                    time.sleep(0.001)
                raise threading.BrokenBarrierError
            return place

    monkeypatch.setattr(threading, "Barrier", Late)
    assert list(in_order(lambda piece, _: piece, range(3), 2)) == [0, 1, 2] and nothing_is_left()
    assert not caplog.records  # of a thread that failed to begin: the others may wait for ever then


def test_results_come_in_order_and_errors_where_they_belong():
    def work(piece: int, stop: threading.Event) -> int:
        time.sleep(0.01 * (5 - piece))
        if piece == 3:
            raise MemoryError("of piece 3")
        return piece

    found = []
    with pytest.raises(MemoryError, match="of piece 3"):
        for result in in_order(work, range(5), 2):
            found.append(result)
    assert found == [0, 1, 2] and nothing_is_left()


def test_what_is_not_begun_is_given_up_and_what_is_under_way_is_told():
    begun, stopped = [], []

    def work(piece: int, stop: threading.Event) -> int:
        begun.append(piece)
        if piece:
            stopped.append(stop.wait(20))
        return piece

    with closing(in_order(work, range(9), 2)) as results:
        assert next(results) == 0
    assert nothing_is_left() and stopped and all(stopped) and len(begun) < 9


def test_threads_that_start_meanwhile_have_as_many_of_their_own_as_before():
    found: list[int] = []
    with closing(in_order(lambda piece, _: piece, range(3), 2)) as results:
        next(results)
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert found == [2]
