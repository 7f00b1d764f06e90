"""Drawing for many at once: the same bytes as alone, fair turns, bounds, and what leaves."""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from armchair.errors import RequestError
from armchair.sample.engine import exact_products
from armchair.sample.pipeline import Artist, load_artist
from armchair.serve.models import Models
from armchair.serve.service import (
    Busy,
    DrawRequest,
    Event,
    Finished,
    Partial,
    Queued,
    Service,
    Stopping,
    UnknownModel,
)
from conftest import write_tiny_bundle

PROMPTS = ("a red circle", "two blue squares", "a green star on black")


@contextlib.asynccontextmanager
async def serving(*models: Path, **options: Any) -> AsyncIterator[Service]:
    options = {"device": "cpu", **options}
    service = Service(Models([f"m{i}={path}" for i, path in enumerate(models)], **options))
    try:
        yield service
    finally:
        await service.close(10)


@contextlib.asynccontextmanager
async def held(service: Service, model: str | None = None) -> AsyncIterator[None]:
    """While inside, the drawing thread waits."""
    go, stands = threading.Event(), threading.Event()

    def wait(artist: Artist) -> None:
        stands.set()
        go.wait(30)

    task = asyncio.create_task(service.run(model, wait))
    assert await asyncio.to_thread(stands.wait, 30)
    try:
        yield
    finally:
        go.set()
        await task


async def draw(service: Service, prompt: str = PROMPTS[0], **fields: Any) -> Any:
    events = [event async for event in service.draw(DrawRequest(prompt=prompt, **fields))]
    assert isinstance(events[-1], Finished)
    return events[-1].drawing


def same(one: Any, other: Any) -> bool:
    return (
        one.scores == other.scores
        and one.candidates == other.candidates
        and np.array_equal(one.codes, other.codes)
        and [i.tobytes() for i in one.images] == [i.tobytes() for i in other.images]
    )


async def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to be")


@pytest.mark.parametrize("weights", ["int8", "fp32"])
def test_under_load_come_the_same_bytes_as_alone(ranked_bundle: Path, weights: str) -> None:
    """Requests of all kinds at once, some of which leave, beside what the artist draws for each alone."""
    if weights == "int8" and not exact_products():
        pytest.skip("this processor does not add up eight-bit products exactly")
    artist = load_artist(ranked_bundle, "cpu", weights=weights)
    photo = Image.fromarray(np.random.Generator(np.random.PCG64(1)).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    kinds: list[dict[str, Any]] = [
        {"candidates": 1},
        {"candidates": 5, "keep": 2},
        {"candidates": 20, "keep": 1},
        {"candidates": 2, "temperature": 0.5, "guidance": 1},
        {"candidates": 2, "image": photo, "rectangle": (4, 8, 12, 16)},
    ]
    alone = {}
    for kind, fields in enumerate(kinds):
        for seed in range(2):
            own = {key: value for key, value in fields.items() if key not in ("image", "rectangle")}
            prompt = PROMPTS[(kind + seed) % 3]
            if "image" in fields:
                alone[kind, seed] = artist.complete(photo, prompt, redraw=(4, 8, 12, 16), seed=seed, **own)
            else:
                alone[kind, seed] = artist.draw(prompt, seed=seed, **own)

    async def main() -> int:
        rng = random.Random(0)
        async with serving(ranked_bundle, weights=weights) as service:

            async def client() -> int:
                await asyncio.sleep(rng.random() * 0.1)
                count = 0
                for _ in range(4):
                    kind, seed = rng.choice(sorted(alone))
                    work = draw(service, PROMPTS[(kind + seed) % 3], seed=seed, **kinds[kind])
                    if rng.random() < 0.4:
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(work, rng.random() * 0.1)
                    else:
                        assert same(await work, alone[kind, seed]), (kind, seed)
                        count += 1
                return count

            counts = await asyncio.gather(*(client() for _ in range(24)))
            await until(lambda: service.models.drawer().idle)
            return sum(counts)

    assert asyncio.run(main()) > 40


def test_events_tell_of_the_queue_of_rows_and_of_the_drawing(tiny_bundle: Path) -> None:
    async def main() -> None:
        async with serving(tiny_bundle) as service:
            partials: list[Partial] = []
            async with held(service):
                stream = service.draw(DrawRequest(prompt="a", candidates=3), partials=True)
                first: asyncio.Future[Event] = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]
                await asyncio.sleep(0.05)
                assert not first.done()
            assert await first == Queued(0)
            async for event in stream:
                if isinstance(event, Partial):
                    partials.append(event)
            assert isinstance(event, Finished) and len(event.drawing.images) == 3
            last = partials[-1]
            assert last.rows == last.of == 4 and len(last.images) == 3
            by_candidate = dict(zip(event.drawing.candidates, event.drawing.images, strict=True))
            assert [i.tobytes() for i in last.images] == [by_candidate[c].tobytes() for c in range(3)]

    asyncio.run(main())


def test_one_picture_does_not_wait_for_a_hundred(tiny_bundle: Path) -> None:
    async def main() -> None:
        async with serving(tiny_bundle) as service:
            large = [asyncio.create_task(draw(service, candidates=100, seed=i)) for i in range(3)]
            await until(lambda: service.models.drawer().load()["drawing"] == 3)
            await draw(service, candidates=1)
            assert not any(task.done() for task in large)
            await asyncio.gather(*large)

    asyncio.run(main())


def test_a_full_queue_says_when_to_come_again_and_takes_in_again(tiny_bundle: Path) -> None:
    async def main() -> None:
        async with serving(tiny_bundle, queue=3, pictures=40) as service:
            async with held(service):
                waiting = [asyncio.create_task(draw(service, candidates=2)) for _ in range(3)]
                await until(lambda: service.models.drawer().load()["waiting"] == 3)
                with pytest.raises(Busy, match="queue is full: 3 requests") as refused:
                    await draw(service)
                assert refused.value.retry_after >= 1
            await asyncio.gather(*waiting)
            async with held(service):
                waiting = [asyncio.create_task(draw(service, candidates=30))]
                await until(lambda: service.models.drawer().load()["pictures"] == 30)
                with pytest.raises(Busy, match="30 pictures"):
                    await draw(service, candidates=11)
            await asyncio.gather(*waiting)
            await draw(service, candidates=11)

    asyncio.run(main())


def test_whoever_goes_away_frees_the_place(tiny_bundle: Path) -> None:
    async def main() -> None:
        async with serving(tiny_bundle, queue=1) as service:
            drawer = await asyncio.to_thread(service.models.drawer)
            events = service.draw(DrawRequest(prompt="a", candidates=500))
            assert await anext(events) == Queued(0)  # type: ignore[arg-type]
            await events.aclose()  # type: ignore[attr-defined]
            steps = await service.run(None, lambda artist: list(drawer.jobs))  # the turn of the call drops it
            assert steps == [] and drawer.load() == {"waiting": 0, "drawing": 0, "pictures": 0}
            async with held(service):
                task = asyncio.create_task(draw(service))
                await until(lambda: drawer.load()["waiting"] == 1)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await draw(service)

    asyncio.run(main())


def test_wrong_requests_are_refused_before_an_event(tiny_bundle: Path) -> None:
    async def main() -> None:
        async with serving(tiny_bundle) as service:
            for fields, said in (
                ({"prompt": ""}, "some words"),
                ({"candidates": 0}, "candidates"),
                ({"candidates": 513}, "at most 512"),
                ({"seed": -1}, "seed"),
                ({"top_p": 2.0}, "top_p"),
                ({"rectangle": (0, 0, 4, 4)}, "both the image and the rectangle"),
                ({"image": Image.new("RGB", (16, 16)), "rectangle": (0, 0, 99, 4)}, "x2"),
            ):
                with pytest.raises(RequestError, match=said):
                    await anext(service.draw(DrawRequest(**{"prompt": "a", **fields})))  # type: ignore[arg-type]
            with pytest.raises(UnknownModel):
                await draw(service, model="other")
            assert await service.run("m0", lambda artist: artist.grid) == 4
            with pytest.raises(ZeroDivisionError):
                await service.run("m0", lambda artist: 1 / 0)

    asyncio.run(main())


def test_a_failure_is_told_and_drawing_goes_on(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    async def main() -> None:
        async with serving(tiny_bundle) as service:
            before = await draw(service, seed=1)
            artist = service.models.artist()
            with monkeypatch.context() as broken:
                broken.setattr(artist, "pictures", lambda *_: [][1])
                with pytest.raises(IndexError):
                    await draw(service, seed=1)
            assert same(await draw(service, seed=1), before)

    asyncio.run(main())
    assert "drawing failed" in caplog.text


def test_at_the_end_what_is_there_is_finished_or_refused(tiny_bundle: Path) -> None:
    async def main(seconds: float) -> list[Any]:
        async with serving(tiny_bundle) as service:
            tasks = [asyncio.create_task(draw(service, candidates=60)) for _ in range(3)]
            await until(lambda: bool(service.models.opened()) and service.models.drawer().load()["drawing"] == 3)
            await service.close(seconds)
            with pytest.raises(Stopping):
                await draw(service)
            return await asyncio.gather(*tasks, return_exceptions=True)

    assert all(len(drawing.images) == 60 for drawing in asyncio.run(main(60)))
    assert all(isinstance(result, Stopping) for result in asyncio.run(main(0)))


def test_bundles_are_opened_and_closed_within_a_bound(tmp_path: Path) -> None:
    paths = [write_tiny_bundle(tmp_path / str(seed), seed) for seed in range(3)]

    async def main() -> None:
        async with serving(*paths) as service:
            size = max(source.size for source in service.models.sources.values())
        async with serving(*paths, memory=2 * size) as service:
            models = service.models
            drawings = [await draw(service, model=name) for name in ("m0", "m1", "m0", "m2")]
            assert list(models.opened()) == ["m0", "m2"]  # m1 was used least lately
            assert same(drawings[0], drawings[2]) and not same(drawings[0], drawings[1])
            async with held(service, "m0"):
                tasks = [asyncio.create_task(draw(service, model="m0"))]
                await draw(service, model="m1")
                assert list(models.opened()) == ["m0", "m1"]
                async with held(service, "m1"):
                    tasks.append(asyncio.create_task(draw(service, model="m1")))
                    await until(lambda: models.opened()["m1"].load()["waiting"] == 1)
                    with pytest.raises(Busy, match="closed for it"):
                        await draw(service, model="m2")
            await asyncio.gather(*tasks)

    asyncio.run(main())


def test_names_and_aliases(tiny_bundle: Path) -> None:
    path = str(tiny_bundle)
    models = Models([path, f"other={path}"], aliases={"gpt-image-1": "other"})
    assert models.names() == ["tiny", "other"] and models.default == "tiny"
    assert models.resolve("gpt-image-1") == "other" and models.resolve(None) == "tiny"
    assert [line["aliases"] for line in models.describe()] == [[], ["gpt-image-1"]]
    for wrong, said in (
        (lambda: Models([path, path]), "two models"),
        (lambda: Models([path], aliases={"x": "tniy"}), "did you mean 'tiny'"),
        (lambda: Models([path], aliases={"tiny": "tiny"}), "is called so"),
        (lambda: Models([path], aliases={"a b": "tiny"}), "letters"),
    ):
        with pytest.raises(RequestError, match=said):
            wrong()


def test_a_step_of_many_takes_less_than_each_alone(tiny_bundle: Path) -> None:
    """That requests are drawn together at all: by the passes through the weights, not by the clock."""

    async def main(count: int) -> int:
        async with serving(tiny_bundle) as service:
            passes = 0
            drawer = await asyncio.to_thread(service.models.drawer)
            if not drawer.decoder.independent_rows:
                pytest.skip("rows are not independent here")
            together = drawer.decoder.decode_together

            def counted(steps: Any) -> Any:
                nonlocal passes
                passes += 1
                return together(steps)

            drawer.decoder.decode_together = counted  # type: ignore[method-assign]
            async with held(service):
                tasks = [asyncio.create_task(draw(service, candidates=1, seed=seed)) for seed in range(count)]
                await until(lambda: drawer.load()["waiting"] == count)
            await asyncio.gather(*tasks)
            return passes

    assert asyncio.run(main(12)) <= 16


def test_time_is_estimated_from_what_is_drawn(tiny_bundle: Path) -> None:
    async def main() -> None:
        async with serving(tiny_bundle) as service:
            began = time.perf_counter()
            await draw(service, candidates=100)
            seconds = (time.perf_counter() - began) / 100
            assert service.models.drawer().seconds < max(0.1, 20 * seconds)

    asyncio.run(main())
