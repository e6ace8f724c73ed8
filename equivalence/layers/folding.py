"""Sliding blocks: Unfold and Fold."""
