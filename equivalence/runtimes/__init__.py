"""The array libraries that execute: torch and jax. Written once for all frameworks on them."""
