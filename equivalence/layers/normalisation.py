"""Normalisation over batch, group, layer and neighbours."""
