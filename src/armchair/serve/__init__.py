"""Models behind HTTP: `armchair serve`."""
