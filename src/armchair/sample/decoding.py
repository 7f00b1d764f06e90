"""Finished codes to pictures in a thread of their own, while the next codes are drawn."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

Picture = TypeVar("Picture")


class DecodingThread(Generic[Picture]):
    """Decodes batches of codes in the order in which they come; at most one waits while another is decoded.

        with DecodingThread(decode) as thread:
            draw_codes(..., finished=thread.take)
            pictures = thread.pictures()

    The thread computes alone: products that it shared with threads of its own would keep those of the drawing waiting.
    Once the `with` is left, by an error or Ctrl-C too, nothing of it runs any more; what waited is given up.
    """

    def __init__(self, decode: Callable[[Tensor], list[Picture]]) -> None:
        self._decode = decode
        self._batches: list[Future[list[Picture]]] = []
        self._pool = ThreadPoolExecutor(1, "decoding")

    def __enter__(self) -> "DecodingThread[Picture]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, codes: Tensor) -> None:
        """Decode a batch, once those before it are. Waits while two are not; raises what decoding these raised."""
        if not self._batches:
            threads = torch.get_num_threads()
            self._pool.submit(_compute_alone).result()
            torch.set_num_threads(threads)  # what threads that start later take for their own
        if len(self._batches) > 1:
            self._batches[-2].result()
        self._batches.append(self._pool.submit(self._decode, codes))

    def pictures(self) -> list[Picture]:
        """Those of all batches, in order, once they are there. Raises what decoding raised."""
        return [picture for batch in self._batches for picture in batch.result()]


def _compute_alone() -> None:
    """For this thread. What was set last anywhere is taken over when a thread first asks, so that comes first."""
    torch.get_num_threads()
    torch.set_num_threads(1)
