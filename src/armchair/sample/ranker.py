"""A ranker for use: CLIP with the text tokenizer that it reads captions through, on PIL images and strings.

Legend: B rows, E size of the shared space, L text length, M states of a picture, D their width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from armchair.bundle import Bundle, find_bundle, read_bundle
from armchair.clip.model import CLIP, CLIPConfig, TextShape
from armchair.config import from_dict
from armchair.errors import BundleError, RequestError
from armchair.image.pixels import BrokenSample, rgb, square, stack
from armchair.runtime import pick_device, unfilled
from armchair.sample.generate import MICRO_BATCH
from armchair.sample.workers import in_order
from armchair.text.bpe import TextTokenizer

MAX_PROMPT = 10_000  # characters; what is left over a model's tokens is cut anyway

TEXTS = 256  # whose places are remembered

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class BundleId:
    name: str
    fingerprint: str


class _Text(NamedTuple):
    tokens: Tensor  # (1, L)
    place: Tensor  # (E,), in the shared space


class Ranker:
    """Scores pictures for a prompt (paper, section 2.6; Radford et al., 2021).

    A score is the cosine, and `caption_weight` times what `caption_log_probs` says: by default as the ranker's config
    has it, and 0 where there is no captioner.
    """

    def __init__(
        self, model: CLIP, read_texts: Callable[[Sequence[str]], Tensor], *, id: BundleId, device: torch.device
    ):
        self.model, self.id, self.device = model, id, device
        self.caption_weight = model.caption_weight
        self._read_texts = read_texts
        self._texts: dict[str, _Text] = {}  # of `score`, the last ones

    def rank(self, images: Image.Image | Sequence[Image.Image], prompt: str) -> list[float]:
        """Scores of images for a prompt, higher is better; without a captioner cosines in [-1, 1].

        Comparable for one prompt only. Images of other sizes are cut square and resized. Raises RequestError for no
        image, or no prompt.
        """
        check_prompt(prompt)
        images = several(images)
        return self.score(images, [prompt] * len(images))

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """`rank` of each image for a prompt of its own.

        Scores are taken one by one, as a product's sums depend on its rows. Texts are read one at a time, as a text's
        sums depend on those beside it, and the last ones are remembered; captions of pictures are one at a time too.
        """
        for prompt in dict.fromkeys(prompts):
            check_prompt(prompt)
            text = self._texts.pop(prompt, None)
            self._texts[prompt] = self._read(prompt) if text is None else text
        texts = [self._texts[prompt] for prompt in prompts]
        while len(self._texts) > TEXTS:
            del self._texts[next(iter(self._texts))]
        states = self.image_states(images) if self.caption_weight else None
        pictures = self.embed_images(images) if states is None else self._embed_states(states)
        scores = [float(picture @ text.place) for picture, text in zip(pictures, texts, strict=True)]
        if states is not None:
            said = self._caption_log_probs(states, [text.tokens for text in texts])
            scores = [score + self.caption_weight * log_p for score, log_p in zip(scores, said, strict=True)]
        return scores

    def embed_images(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Where images lie in the shared space, (B, E) float32 of length one. Raises as `rank`."""
        with torch.inference_mode():
            squares = self._squares(images)
            return in_micro_batches(lambda x: self.model.encode_images(x.to(self.device)).cpu(), squares, self.device)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Where texts lie in the shared space, (B, E) float32 of length one."""
        return self._embed_tokens(self._read_texts(texts))

    def image_states(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """What a captioner looks at, (B, M, D) float32. Raises as `rank`, and RequestError where there is none."""
        self._check_captions()
        with torch.inference_mode():
            squares = self._squares(images)
            return in_micro_batches(lambda x: self.model.image_states(x.to(self.device)).cpu(), squares, self.device)

    def caption_log_probs(self, states: Tensor, texts: Sequence[str]) -> list[float]:
        """log2 p(text | picture) a token, the end among them, of pictures' states (B, M, D) and a text of each.

        Raises RequestError where there is no captioner.
        """
        self._check_captions()
        tokens = {text: self._read_texts([text]) for text in dict.fromkeys(texts)}
        return self._caption_log_probs(states, [tokens[text] for text in texts])

    def _caption_log_probs(self, states: Tensor, tokens: Sequence[Tensor]) -> list[float]:
        """The same of tokens, (1, L) each."""
        with torch.inference_mode():
            return [
                float(self.model.caption_log_prob(seen[None].to(self.device), said.to(self.device))) / math.log(2)
                for seen, said in zip(states, tokens, strict=True)
            ]

    def _read(self, prompt: str) -> _Text:
        tokens = self._read_texts([prompt])
        return _Text(tokens, self._embed_tokens(tokens)[0])

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            return in_micro_batches(lambda x: self.model.encode_text(x.to(self.device)).cpu(), tokens, self.device)

    def _embed_states(self, states: Tensor) -> Tensor:
        with torch.inference_mode():
            return in_micro_batches(lambda x: self.model.encode_states(x.to(self.device)).cpu(), states, self.device)

    def _squares(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        size = self.model.config.image.resolution
        return stack([square_of(image, size) for image in several(images)])

    def _check_captions(self) -> None:
        if self.model.captioner is None:
            raise RequestError(f"the ranker of bundle {self.id.name} has no captioner, it compares vectors only")


def load_ranker(model: str | Path, device: str = "auto") -> Ranker:
    """The ranker of a bundle that was trained with one, or of one that `armchair import openai-clip` wrote.

    Raises BundleError for a bundle that is missing, not whole or without a ranker.
    """
    return open_ranker(read_bundle(find_bundle(str(model))), pick_device(device))


def open_ranker(bundle: Bundle, device: torch.device, text_tokenizer: TextTokenizer | None = None) -> Ranker:
    """The same for a bundle that is open, and perhaps its `text_tokenizer` too."""
    if "ranker" not in bundle.parts:
        raise BundleError(f"{bundle.path}: this bundle has no ranker")
    if bundle.text_tokenizer is None:
        raise BundleError(f"{bundle.path}: no text_tokenizer.json in this bundle")
    info = bundle.info
    read_texts: Callable[[Sequence[str]], Tensor]
    try:
        if "ranker" in info:  # imported: the released models have a text tokenizer of their own
            from armchair.text.clip_bpe import ClipTextTokenizer  # here alone, as few have such a ranker

            config = from_dict(CLIPConfig, info["ranker"], "ranker")
            clip_tokenizer = ClipTextTokenizer.from_json(bundle.text_tokenizer)
            length = _whole_field(info["text_length"])
            shape = TextShape(length=length, vocab_size=clip_tokenizer.vocab_size)

            def read_texts(texts: Sequence[str]) -> Tensor:
                return torch.from_numpy(clip_tokenizer.encode(texts, length))
        else:
            config = from_dict(CLIPConfig, info["recipe"]["ranker"], "recipe.ranker")
            tokenizer = text_tokenizer or TextTokenizer.from_json(bundle.text_tokenizer)
            length = _whole_field(info["recipe"]["text_tokenizer"]["length"])
            shape = TextShape.of_captions(length, tokenizer.vocab_size)

            def read_texts(texts: Sequence[str]) -> Tensor:
                return shape.with_end(torch.from_numpy(tokenizer.encode(texts, length)))
    except (KeyError, TypeError) as error:
        raise BundleError(f"{bundle.path}: bundle.json lacks what ranking needs, or has it wrong: {error}") from None
    except RequestError as error:
        raise BundleError(f"{bundle.path}: bundle.json: {error}") from None
    model = load_part(lambda: CLIP(config, shape), bundle, "ranker", device)
    return Ranker(model, read_texts, id=BundleId(name=bundle.name, fingerprint=bundle.fingerprint), device=device)


def load_part(make: Callable[[], M], bundle: Bundle, part: str, device: torch.device) -> M:
    """The model that `make` builds, with the weights of a bundle's part. Raises BundleError where they do not fit."""
    weights = bundle.weights(part)
    with unfilled():
        model = make()
    try:
        model.load_state_dict(weights)  # copies 16 bits into 32
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:200]  # line 0 only says that there are errors
        raise BundleError(f"{bundle.path}: {part}.safetensors does not fit the bundle's recipe: {first}") from None
    return model.to(device).eval().requires_grad_(False)


def check_prompt(prompt: str) -> None:
    """Raises RequestError for a prompt that is empty or has more than 10,000 characters."""
    if not isinstance(prompt, str):
        raise RequestError(f"prompt: expected text, got {type(prompt).__name__}")
    if not prompt.strip():
        raise RequestError("prompt: expected some words, got an empty text")
    if len(prompt) > MAX_PROMPT:
        raise RequestError(f"prompt: expected at most {MAX_PROMPT} characters, got {len(prompt)}")


def several(images: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    """One image or more as a list. Raises RequestError for none."""
    images = [images] if isinstance(images, Image.Image) else list(images)
    if not images:
        raise RequestError("images: expected at least one")
    return images


def square_of(image: Image.Image, size: int) -> np.ndarray:
    """An image cut square and resized, uint8 (size, size, 3). Raises RequestError for what is no image."""
    if not isinstance(image, Image.Image):
        raise RequestError(f"image: expected a PIL image, got {type(image).__name__}")
    if not min(image.size):
        raise RequestError(f"image: expected at least one pixel, got {image.width} x {image.height}")
    try:
        return square(np.asarray(rgb(image)), size)
    except BrokenSample as broken:
        raise RequestError(f"image: {broken.cause}; expected 8-bit RGB or grey") from None


def in_micro_batches(f: Callable[[Tensor], Tensor], x: Tensor, device: torch.device) -> Tensor:
    """`f`, which computes on a device, so that no row depends on how many there are, nor on its place among them.

    MICRO_BATCH rows at a time, filled up; but one on a CPU without AVX-512, where sums in 32 bits can be done otherwise
    for the first rows of a product than for the last, and otherwise by two threads than by one (seen on an AMD EPYC):
    there each thread computes rows of its own.
    """
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        alone = torch.inference_mode()(lambda row, _: f(row))  # a mode is its thread's, not its process's
        return torch.cat(list(in_order(alone, x.split(1), torch.get_num_threads())))
    done = []
    for start in range(0, len(x), MICRO_BATCH):
        rows = torch.arange(start, start + MICRO_BATCH).clamp(max=len(x) - 1)
        done.append(f(x[rows])[: len(x) - start])
    return torch.cat(done)


def _whole_field(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected a whole number, got {value!r}")
    return value
