"""Layers of torch.nn as Flax modules: `translate` makes the module, its weights and the mapping that moved them."""
