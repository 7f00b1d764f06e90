"""armchair: DALL·E end to end, for one's own text-to-image models."""

from typing import TYPE_CHECKING, Any

from armchair.errors import ArmchairError, BundleError, DataError, RequestError, WorkError

if TYPE_CHECKING:
    from armchair.sample.pipeline import Artist, Drawing

__version__ = "0.1.0"
__all__ = [
    "Artist",
    "ArmchairError",
    "BundleError",
    "DataError",
    "Drawing",
    "RequestError",
    "WorkError",
    "load",
]


def load(model: Any = None, device: str = "auto", ranker: Any = None, weights: str | None = None) -> "Artist":
    """Open a bundle for drawing: a path, a bundled name, a hub id, or None for the default.

    `ranker` names another bundle whose ranker shall judge the drawings, in place of the bundle's own. `weights`: the
    form that the prior's are drawn with, `int8` (the default on a CPU), `bf16` (the default on a GPU that has it) or
    `fp32`. Raises BundleError for a bundle that is missing or not whole, RequestError for an unknown device or form.
    """
    from armchair.sample.pipeline import load_artist

    return load_artist(model, device, ranker, weights)


def __getattr__(name: str) -> Any:
    if name in ("Artist", "Drawing"):  # PyTorch is imported only when it is needed
        from armchair.sample import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'armchair' has no attribute {name!r}")
