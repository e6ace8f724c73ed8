"""Padding with constants, reflections, replicas and around the circle."""
