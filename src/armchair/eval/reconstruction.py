"""What the image tokenizer loses: held-out pictures through the codes and back."""

import numpy as np
import torch

from armchair.errors import RequestError
from armchair.eval.distances import FID_RESAMPLES, fid_figure
from armchair.eval.features import named
from armchair.eval.figures import Cell, Figure, Section, Table, around, bootstrap, mean_figure
from armchair.eval.pairs import Context
from armchair.image.pixels import stack

SHOWN = 8
CODE_RESAMPLES = 200


def reconstruction(context: Context) -> Section:
    artist, images = context.artist, context.held_out.images
    codes = artist.encode(context.pil(images))
    returned = [np.asarray(image) for image in artist.decode(codes)]
    context.once("returned", lambda: returned)
    errors = [((a / 255.0 - b / 255.0) ** 2).mean() for a, b in zip(images, returned, strict=True)]
    psnr = [min(99.0, -10 * np.log10(max(e, 1e-12))) for e in errors]
    rows: list[tuple[Cell, ...]] = [
        ("PSNR, dB", mean_figure(psnr)),
        ("SSIM", mean_figure(structural_similarity(images, returned))),
        *code_figures(codes, artist.image_tokenizer.codebook_size),
    ]
    tables = [Table(title="Round trips", columns=("", "value"), rows=rows)]
    for network in context.networks:
        real = context.extracted(network, "held-out pictures", images).features
        back = context.extracted(network, "their round trips", returned).features
        tables.append(
            Table(
                title=f"rFID over {network.name}",
                columns=("", "rFID"),
                rows=[("held-out pictures and their round trips", fid_figure(real, back))],
                features=named(network),
            )
        )
    shown = [image for pair in zip(images[:SHOWN], returned[:SHOWN], strict=True) for image in pair]
    return Section(
        key="reconstruction",
        title="Reconstruction",
        protocol=(
            f"{len(images)} held-out pictures, cut square and resized by area to {artist.resolution} x "
            f"{artist.resolution}, encoded to codes (argmax) and decoded. PSNR and SSIM (torchmetrics, Gaussian window "
            "of 11, data range 1) on RGB in [0, 1], means over pictures. rFID is the FID of the pictures and their "
            "round trips. Intervals of codes in use, of perplexity and of rFID are 1.96 standard deviations of "
            f"bootstrap resamples of pictures, {CODE_RESAMPLES} for codes, {FID_RESAMPLES} for rFID. More pictures use "
            "more codes: compare these at equal numbers."
        ),
        tables=tables,
        pictures=[context.sheet("reconstruction", shown, None, "Held-out pictures, each followed by its round trip")],
    )


def code_figures(codes: np.ndarray, codebook_size: int) -> list[tuple[Cell, ...]]:
    """Rows of what codes (N, S, S) say of their codebook, with intervals over pictures."""
    flat = codes.reshape(len(codes), -1)

    def shares(rows: np.ndarray) -> tuple[float, float]:
        """Of the codebook in use, and perplexity."""
        p = np.bincount(flat[rows].ravel(), minlength=codebook_size) / flat[rows].size
        p = p[p > 0]
        return len(p) / codebook_size, float(np.exp(-(p * np.log(p)).sum()))

    count = len(flat)
    used, perplexity = shares(np.arange(count))
    rng = np.random.Generator(np.random.PCG64(0))
    resampled = [shares(rng.integers(count, size=count)) for _ in range(CODE_RESAMPLES)]
    distinct = np.array([len(np.unique(row)) for row in flat])
    interval = bootstrap(count, lambda i: float(np.median(distinct[i])), resamples=CODE_RESAMPLES)
    return [
        ("codes in use, share", around(used, [u for u, _ in resampled], count, least=0, most=1)),
        ("perplexity of the codes", around(perplexity, [x for _, x in resampled], count, least=1, most=codebook_size)),
        ("distinct codes a picture, median", Figure(value=float(np.median(distinct)), interval=interval, count=count)),
    ]


def structural_similarity(images: list[np.ndarray], returned: list[np.ndarray]) -> np.ndarray:
    """SSIM of each pair of uint8 pictures (R, R, 3), (N,). Raises RequestError where torchmetrics is missing."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    except ImportError:
        raise RequestError("evaluation needs more packages: pip install 'armchair[evaluate]'") from None
    found = [
        ssim(stack(returned[i : i + 64]), stack(images[i : i + 64]), data_range=1.0, reduction="none")
        for i in range(0, len(images), 64)
    ]
    return torch.cat([torch.as_tensor(f).flatten() for f in found]).numpy()
