"""armchair: DALL·E end to end, for one's own text-to-image models."""

__version__ = "0.1.0"
