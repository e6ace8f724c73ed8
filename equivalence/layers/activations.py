"""Activations, element by element, and the softmaxes."""
