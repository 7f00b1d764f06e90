"""FID, KID and IS over features that are computed already, through torchmetrics; and intervals for them.

Legend: N pictures, F features.
"""

import importlib
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from armchair.errors import RequestError
from armchair.eval.figures import Figure, around

FID_RESAMPLES = 30  # each is a decomposition of N x N numbers
KID_SUBSETS, KID_SUBSET = 100, 1000  # subsets, and at most so many pictures in each
KID_RESAMPLES = 200
IS_SPLITS = 10
IS_RESAMPLES = 200


class _Given(nn.Module):
    """Stands where torchmetrics wants a network: the features are there already."""

    def __init__(self, count: int):
        super().__init__()
        self.num_features = count

    def forward(self, x: Tensor) -> Tensor:
        return x


def fid(real: Tensor, fake: Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets of features, (N, F) and (M, F) (Heusel et al., 2017).

    Lower is better. It falls with the number of pictures, so that figures are comparable at equal numbers only.
    """
    metric = _torchmetrics("fid", "FrechetInceptionDistance", feature=_Given(real.shape[1]))
    metric.set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def kid(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the polynomial-kernel MMD^2 (Binkowski et al., 2018). Unbiased."""
    size = max(2, min(KID_SUBSET, len(real) // 2, len(fake) // 2))
    metric = _torchmetrics(
        "kid", "KernelInceptionDistance", feature=_Given(real.shape[1]), subsets=KID_SUBSETS, subset_size=size
    )
    metric.update(real.float(), real=True)
    metric.update(fake.float(), real=False)
    with torch.random.fork_rng(devices=[]):  # it draws its subsets from the global generator
        torch.manual_seed(0)
        mean, spread = metric.compute()
    return float(mean), float(spread)


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL divergence of a picture's classes from all pictures' (Salimans et al., 2016), (N, classes)."""
    metric = _torchmetrics(
        "inception", "InceptionScore", feature=_Given(logits.shape[1]), splits=min(IS_SPLITS, len(logits))
    )
    metric.update(logits.float())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, _ = metric.compute()
    return max(1.0, float(mean))  # which in 32 bits can come out as a little less


def fid_from_pairs(real: Tensor, fake: Tensor) -> float:
    """`fid` again, without the F x F covariances.

    With centred features X (N, F) and Y (M, F), the trace of (S S')^(1/2) is the sum of the singular values of X Y^T,
    over sqrt((N-1)(M-1)). Where there are more pictures than features, X and Y are replaced by the triangles of their
    QR decompositions, which have the same singular values between them.
    """
    x, y = real.double(), fake.double()
    gap = (x.mean(0) - y.mean(0)).square().sum()
    x, y = x - x.mean(0), y - y.mean(0)
    own = x.square().sum() / (len(x) - 1) + y.square().sum() / (len(y) - 1)
    pairs = ((len(x) - 1) * (len(y) - 1)) ** 0.5
    x, y = (torch.linalg.qr(z).R if len(z) > z.shape[1] else z for z in (x, y))
    return float(gap + own - 2 * torch.linalg.svdvals(x @ y.T).sum() / pairs)


def fid_figure(real: Tensor, fake: Tensor) -> Figure:
    """With 1.96 standard deviations of bootstrap resamples either side.

    Not their percentiles: resampled pictures repeat, and that alone moves an FID up.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    values = [
        fid_from_pairs(real[_resample(len(real), rng)], fake[_resample(len(fake), rng)]) for _ in range(FID_RESAMPLES)
    ]
    return around(fid(real, fake), values, min(len(real), len(fake)))


def kid_figure(real: Tensor, fake: Tensor) -> Figure:
    """With an interval as `fid_figure` has it."""
    x, y = real.double(), fake.double()
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    rng = np.random.Generator(np.random.PCG64(0))
    values = []
    for _ in range(KID_RESAMPLES):
        times = [torch.bincount(_resample(len(z), rng), minlength=len(z)).double() for z in (x, y)]
        values.append(_mmd(xx, yy, xy, *times))
    return around(kid(real, fake)[0], values, min(len(real), len(fake)))


def _mmd(xx: Tensor, yy: Tensor, xy: Tensor, a: Tensor, b: Tensor) -> float:
    """The unbiased MMD^2 from kernels between pictures, picture i of X counted a_i times and j of Y b_j times."""
    n, m = a.sum(), b.sum()
    own = (a @ xx @ a - a @ xx.diagonal()) / (n * (n - 1)) + (b @ yy @ b - b @ yy.diagonal()) / (m * (m - 1))
    return float(own - 2 * (a @ xy @ b) / (n * m))


def _resample(count: int, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.integers(count, size=count))


def inception_figure(logits: Tensor) -> Figure:
    """With an interval as `fid_figure` has it.

    Resamples are scored whole, as their splits would have the same picture in several; the spread is taken as large a
    part of the value as it is of the whole's score.
    """
    p = logits.double().softmax(1)
    entropy = (p * p.clamp_min(1e-300).log()).sum(1)

    def score(rows: Tensor) -> float:
        marginal = p[rows].mean(0)
        return float((entropy[rows].mean() - (marginal * marginal.clamp_min(1e-300).log()).sum()).exp())

    rng = np.random.Generator(np.random.PCG64(0))
    value, whole = inception_score(logits), score(torch.arange(len(p)))
    values = [value / whole * score(_resample(len(p), rng)) for _ in range(IS_RESAMPLES)]
    return around(value, values, len(p), least=1.0)


def _torchmetrics(module: str, name: str, **settings: Any) -> Any:
    try:
        metric = getattr(importlib.import_module(f"torchmetrics.image.{module}"), name)
    except ImportError:
        raise RequestError("evaluation needs more packages: pip install 'armchair[evaluate]'") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer", category=UserWarning)
        return metric(**settings)
