"""Transformer layers and stacks of them."""
