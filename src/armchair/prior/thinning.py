"""Pictures of which the prior's training looks at a part of the codes: where something goes on, and a little elsewhere.

Legend: B batch, S grid side, N = S*S image tokens, M of them looked at.

Most codes of a flat picture go on as those around them do, and the prior soon has little to learn from these; they take
their share of the time all the same. A thinned picture is a sample of its codes, each counting as many times as it was
unlikely to be taken, so that the loss is on average that of all codes of what the model is shown. What is left out is
not shown either, which is another thing than whole pictures: training has to end with those.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN_SHARE = 8  # at least one place in so many is plain, however much goes on: what stands for many must not be one


class Thinned(NamedTuple):
    places: Tensor  # (B, M) image tokens, ascending; the first is token 0, at which the caption ends
    weights: Tensor  # (B, M) how many tokens each stands for; they come to N on average


def busy_places(codes: Tensor, grid: int) -> Tensor:
    """(B, N) -> bool (B, N): where a code is not the one of all its neighbours that come before it.

    These are left, above, and above to both sides. It is known from codes up to that place: that one was taken tells a
    model nothing of what comes after. (How many plain ones were depends on the whole picture, and tells a little.)
    """
    rows = codes.unflatten(1, (grid, grid))
    padded = F.pad(rows, (1, 1, 1, 0), value=-1)
    around = (padded[:, 1:, :-2], padded[:, :-1, 1:-1], padded[:, :-1, :-2], padded[:, :-1, 2:])
    return torch.stack([(near != rows) & (near >= 0) for near in around]).any(0).flatten(1)


def thinned(codes: Tensor, grid: int, count: int, generator: torch.Generator) -> Thinned:
    """codes: (B, N); count: M, from 3 to N, or N. Token 0, all places where something goes on, and plain ones by lot.

    Where there are too many of the former, they are drawn by lot too.
    """
    busy = busy_places(codes, grid)
    busy[:, 0] = False
    lots = torch.rand(codes.shape, generator=generator, device=codes.device)
    lots[:, 0] = 2.0
    order = (lots + busy).argsort(1, descending=True)  # token 0, the busy ones, the plain ones
    wanted, most = count - 1, codes.shape[1] - 1
    busy_count = busy.sum(1, keepdim=True)
    plain_taken = (wanted - busy_count).clamp(min=-(-wanted // PLAIN_SHARE)).minimum(most - busy_count)
    busy_taken = wanted - plain_taken
    nth = torch.arange(wanted, device=codes.device)
    places = order.gather(1, 1 + nth + torch.where(nth < busy_taken, 0, busy_count - busy_taken))
    places = F.pad(places.sort(1).values, (1, 0))
    stands_for = torch.where(
        busy.gather(1, places), busy_count / busy_taken.clamp(min=1), (most - busy_count) / plain_taken.clamp(min=1)
    )
    stands_for[:, 0] = 1.0
    return Thinned(places, stands_for)
