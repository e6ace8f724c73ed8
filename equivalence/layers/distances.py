"""Distances between two inputs."""
