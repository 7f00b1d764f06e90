"""What a run tells: a progress line for people, JSON lines and TensorBoard for programs, sheets to look at."""

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from torch import Tensor

from armchair.runtime import duration
from armchair.train.recipe import FitConfig


class Report:
    """Writes RUN/log.jsonl, RUN/sheets/*.png and, where tensorboard is installed, RUN/tensorboard/.

    `stream` gets the progress: one line that is redrawn on a terminal, a line now and then elsewhere.
    `command` is what a stage's figures were made by, as the log remembers it.
    """

    def __init__(self, run: Path, stream: TextIO | None = sys.stderr, command: str | None = None):
        self.run, self.stream, self.command = run, stream, command
        (run / "sheets").mkdir(parents=True, exist_ok=True)
        self.log = (run / "log.jsonl").open("a", encoding="utf-8")
        self.board = _board(run)
        self.stage = ""
        self.config: FitConfig | None = None
        self.began = time.time()

    def message(self, text: str) -> None:
        """One line for people."""
        if self.stream is not None:
            self.stream.write(("\r\033[K" if self.stream.isatty() else "") + text + "\n")
            self.stream.flush()

    def record(self, event: str, **fields: Any) -> None:
        """One JSON line."""
        self.log.write(json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n")
        self.log.flush()

    def begin(self, stage: str, start: int, config: FitConfig) -> None:
        self.stage, self.config = stage, config
        self.started, self.start_step, self.last_line = time.time(), start, 0.0
        self.record("begin", stage=stage, step=start, steps=config.steps, command=self.command)
        verb = f"going on from step {start}" if start else "starting"
        self.message(f"{stage}: {verb}, {config.steps} steps of {config.batch_size}")

    def step(self, done: int, metrics: dict[str, Tensor | float]) -> None:
        """Called every step; turns tensors into numbers, which waits for the device, only when it writes."""
        assert self.config is not None
        log = done % self.config.log_every == 0 or done == self.config.steps
        tty = self.stream is not None and self.stream.isatty()
        now = time.time()
        show = now - self.last_line > (0.5 if tty else 15) or done == self.config.steps
        if not (log or show):
            return
        values = {k: round(float(v), 6) for k, v in metrics.items()}
        rate = (done - self.start_step) / (now - self.started)
        if log:
            self.record(
                "step", stage=self.stage, step=done, images_per_second=round(rate * self.config.batch_size, 2), **values
            )
            self._scalars("train", done, values)
        if show and self.stream is not None:
            self.last_line = now
            left = (self.config.steps - done) / rate
            line = (
                f"{self.stage} {done}/{self.config.steps}  loss {values['loss']:.4f}  "
                f"{rate * self.config.batch_size:.0f} images/s  {duration(left)} left  {memory_gib():.1f} GiB"
            )
            self.stream.write(f"\r\033[K{line}" if tty else line + "\n")
            self.stream.flush()

    def validation(self, done: int, figures: dict[str, float]) -> None:
        figures = {k: round(float(v), 5) for k, v in figures.items()}
        self.record("validation", stage=self.stage, step=done, **figures)
        self._scalars("val", done, figures)
        self.message(f"{self.stage} {done}: " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    def sheet(self, done: int, image: Image.Image | None) -> None:
        if image is not None:
            image.save(self.run / "sheets" / f"{self.stage}_{done:08d}.png")

    def end(self) -> None:
        self.record("end", stage=self.stage, seconds=round(time.time() - self.started, 1))
        self.message(f"{self.stage}: done in {duration(time.time() - self.started)}")

    def close(self) -> None:
        self.log.close()
        if self.board is not None:
            self.board.close()

    def _scalars(self, group: str, step: int, values: dict[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{self.stage}/{group}/{name}", value, step)


def memory_gib() -> float:
    """Resident memory of this process, in GiB (0 where the system does not tell)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * 4096 / 2**30


def _board(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the `train` extra brings it; a run without it still has log.jsonl
        return None
    return SummaryWriter(str(run / "tensorboard"))
