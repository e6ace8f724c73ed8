"""Pooling to a given size: adaptive and fractional."""
