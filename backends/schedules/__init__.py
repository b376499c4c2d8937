"""Schedule families: each takes a region and its knobs and gives a PrimFunc."""
