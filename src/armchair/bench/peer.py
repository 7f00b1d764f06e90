"""Times another project's model of a Job's sizes, with random weights. Run in that project's environment:

    PYTHON peer.py '{"system": "gpt2", "what": "sampling", "batch": 8, ...}'

prints one JSON line: tokens (or samples) and seconds. Needs PyTorch and the peer, of armchair only `shape.py`, which
lies beside it.

Packages that a peer imports and a timed run never calls are replaced by empty stand-ins: torchvision has no build that
loads beside every PyTorch, and taming-transformers wants a lightning of years ago.
"""

import contextlib
import importlib.machinery
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from shape import Job  # type: ignore[import-not-found]  # noqa: E402

SPREAD = 8  # tokens, evenly over the picture, that stand for all where each is computed from nothing


class _StandIn(types.ModuleType):
    """A module of which any name can be imported."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {})
        setattr(self, name, value)
        return value


def stand_in(*names: str) -> None:
    for name in names:
        module = sys.modules[name] = _StandIn(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def dalle_pytorch(job: Job) -> Any:
    """DALLE of dalle-pytorch at its own defaults, over a tokenizer that does nothing."""
    import torch
    import transformers  # type: ignore[import-not-found]  # noqa: F401  # looks for packages: before the stand-ins

    stand_in("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "PIL", "PIL.Image")
    stand_in("requests", "omegaconf", "youtokentome", "taming", "taming.models", "taming.models.vqgan")
    with contextlib.suppress(ImportError):
        import pkg_resources  # type: ignore[import-not-found]  # noqa: F401
    if "pkg_resources" not in sys.modules:
        stand_in("pkg_resources")
    import dalle_pytorch.dalle_pytorch as package  # type: ignore[import-not-found]

    class Tokenizer(package.DiscreteVAE):  # type: ignore[misc]
        """An eighth of the side in codes; only its sizes are asked for while a run is timed."""

        def __init__(self) -> None:
            super().__init__(
                image_size=8 * job.grid, num_layers=3, num_tokens=job.codebook, codebook_dim=4, hidden_dim=4
            )
            self.given: Any = None

        def get_codebook_indices(self, images: Any) -> Any:
            return self.given

        def decode(self, codes: Any) -> Any:
            return torch.zeros(len(codes), 3, 1, 1)

    class Cached(package.DALLE):  # type: ignore[misc]
        """Version 1.6.6 drops the cache that it is given wherever guidance is off; this hands it on."""

        def forward_with_cond_scale(self, *args: Any, cond_scale: float = 1, cache: Any = None, **more: Any) -> Any:
            if cond_scale == 1:
                return self(*args, cache=cache, **more)
            return super().forward_with_cond_scale(*args, cond_scale=cond_scale, cache=cache, **more)

    kind = Cached if job.system.endswith("cached") else package.DALLE
    return kind(
        dim=job.width,
        vae=Tokenizer(),
        num_text_tokens=job.text_vocab,
        text_seq_len=job.text,
        depth=job.depth,
        heads=job.heads,
        dim_head=job.width // job.heads,
    )


def draw_dalle_pytorch(job: Job) -> Callable[[], int]:
    """Without its cache each token costs all that came before, so SPREAD tokens stand for the picture."""
    import torch

    model = dalle_pytorch(job).eval()
    text = torch.randint(1, job.text_vocab, (job.batch, job.text))
    cached = job.system.endswith("cached")

    def window(start: int, stop: int) -> None:
        given = {}
        if start:
            model.vae.given = torch.randint(0, job.codebook, (job.batch, job.image))
            side = model.vae.image_size
            given = {"img": torch.zeros(job.batch, 3, side, side), "num_init_img_tokens": start}
        model.image_seq_len = stop  # where drawing stops
        model.generate_images(text, **({"use_cache": True} if cached else {}), **given)
        model.image_seq_len = job.image

    def draw() -> int:
        if cached:
            window(0, job.image)
            return job.image
        for i in range(SPREAD):
            place = int((i + 0.5) * job.image / SPREAD)
            window(place, place + 1)
        return SPREAD

    return draw


def gpt2(job: Job) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel  # type: ignore[import-not-found]

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=job.text_vocab + job.codebook,
            n_positions=job.text + job.image,
            n_embd=job.width,
            n_layer=job.depth,
            n_head=job.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def draw_gpt2(job: Job) -> Callable[[], int]:
    import torch

    model = gpt2(job).eval()
    text = torch.randint(0, job.text_vocab, (job.batch, job.text))

    def draw() -> int:
        with torch.inference_mode():
            model.generate(
                text,
                attention_mask=torch.ones_like(text),
                do_sample=True,
                top_k=0,
                use_cache=True,
                min_new_tokens=job.image,
                max_new_tokens=job.image,
                pad_token_id=0,
            )
        return job.image

    return draw


def draw_min_dalle(job: Job) -> Callable[[], int]:
    """Its decoder alone; guidance cannot be turned off, so it computes two rows a picture."""
    import torch

    stand_in("PIL", "PIL.Image", "requests", "emoji")
    from min_dalle.models import DalleBartDecoder, DalleBartEncoder  # type: ignore[import-not-found]

    torch.set_num_threads(job.threads)  # its import takes all cores, and turns gradients off
    if job.grid != 16:
        raise ValueError("min-dalle has a grid of 16 x 16 and no other")
    sizes = {
        "attention_head_count": job.heads,
        "embed_count": job.width,
        "layer_count": job.depth,
        "glu_embed_count": round(job.width * 8 / 3),
        "device": "cpu",
    }
    encoder = DalleBartEncoder(text_vocab_count=job.text_vocab, text_token_count=job.text, **sizes).eval()
    decoder = DalleBartDecoder(image_vocab_count=job.codebook, **sizes).eval()
    settings = torch.tensor([1.0, 256, 16.0])  # temperature, top-k, guidance

    def draw() -> int:
        with torch.no_grad():
            text = torch.randint(3, job.text_vocab, (2, job.text))
            rows = [0] * job.batch + [1] * job.batch
            state, mask = encoder(text)[rows], text[rows].not_equal(1)[:, None, None, :]
            memory = torch.zeros(job.depth, 4 * job.batch, job.image, job.width)
            codes = torch.full((job.batch, job.image + 1), job.codebook)
            for i in range(job.image):
                codes[:, i + 1], memory = decoder.sample_tokens(
                    settings=settings,
                    attention_mask=mask,
                    encoder_state=state,
                    attention_state=memory,
                    prev_tokens=codes[:, [i]],
                    token_index=torch.tensor([i]),
                )
        return job.image

    return draw


def training(job: Job) -> Callable[[], None]:
    """One update: forward, backward, AdamW."""
    import torch

    text = torch.randint(1, job.text_vocab, (job.batch, job.text))
    codes = torch.randint(0, job.codebook, (job.batch, job.image))
    if job.system == "gpt2":
        model = gpt2(job).train()
        ids = torch.cat([text, job.text_vocab + codes], 1)

        def loss() -> Any:
            return model(input_ids=ids, labels=ids, use_cache=False).loss
    elif job.system == "dalle-pytorch":
        model = dalle_pytorch(job).train()

        def loss() -> Any:
            return model(text, codes, return_loss=True)
    else:
        raise ValueError(f"{job.system} has no training of its own to time")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def update() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


DRAW = {
    "dalle-pytorch": draw_dalle_pytorch,
    "dalle-pytorch-cached": draw_dalle_pytorch,
    "gpt2": draw_gpt2,
    "min-dalle": draw_min_dalle,
}


def timed_training(update: Callable[[], None], job: Job) -> dict[str, Any]:
    """Samples and the seconds of the median update, after one that is not counted."""
    seconds = []
    for _ in range(job.steps + 1):
        began = time.perf_counter()
        update()
        seconds.append(time.perf_counter() - began)
    return {"count": job.batch, "seconds": sorted(seconds[1:])[(job.steps - 1) // 2]}


def timed_drawing(draw: Callable[[], int], job: Job) -> dict[str, Any]:
    """Image tokens of all pictures, and the seconds that they took."""
    began = time.perf_counter()
    tokens = draw()
    return {"count": tokens * job.batch, "seconds": time.perf_counter() - began}


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    try:
        import torch

        torch.set_num_threads(job.threads)
        torch.manual_seed(0)
        if job.what == "training":
            result = timed_training(training(job), job)
        else:
            result = timed_drawing(DRAW[job.system](job), job)
        result["torch"] = str(torch.__version__)
    except ImportError as error:
        result = {"missing": error.name or str(error)}
    except ValueError as error:
        result = {"refused": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
