"""Layers that only move elements: flattening and shuffling."""
