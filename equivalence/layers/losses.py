"""Losses as layers: the functions of `equivalence.losses`."""
