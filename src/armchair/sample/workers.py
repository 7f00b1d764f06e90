"""Pieces of work for several threads, each of which computes alone."""

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Piece, threading.Event], Result], pieces: Sequence[Piece], threads: int
) -> Generator[Result, None, None]:
    """What `work` gives for each piece, in order, with as many of them under way as there are threads.

    Threads that share out one small product after the other spend their time waiting for each other; with a piece each
    they do not wait. With fewer than two the caller does all; else a single piece too is computed alone, so that its
    bits do not depend on how many there are. When the iterator is closed before its end, pieces that are not begun are
    given up, and the event that `work` is given is set: it may raise then, and is waited for. Raises what `work`
    raises.
    """
    stop = threading.Event()
    if threads < 2 or not pieces:
        for piece in pieces:
            yield work(piece, stop)
        return
    threads = min(threads, len(pieces))
    before, ready = torch.get_num_threads(), threading.Barrier(threads + 1)
    pool = ThreadPoolExecutor(threads, "drawing", initializer=_compute_alone, initargs=(ready,))
    try:
        results = [pool.submit(work, piece, stop) for piece in pieces]
        ready.wait()
        torch.set_num_threads(before)  # what threads that start later take for their own
        for result in results:
            yield result.result()
    finally:
        stop.set()
        ready.abort()
        pool.shutdown(cancel_futures=True)


def _compute_alone(ready: threading.Barrier) -> None:
    """For this thread. What was set last anywhere is taken over when a thread first asks, so that comes first.

    A thread that wakes only when the others have done all work finds a barrier that is given up. It must not raise: a
    pool whose thread does not begin throws away what tells the others to end.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.suppress(threading.BrokenBarrierError):
        ready.wait()
