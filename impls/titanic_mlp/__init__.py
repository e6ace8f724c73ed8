"""A small classifier of the Titanic's passengers."""
