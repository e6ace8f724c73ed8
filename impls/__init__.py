"""Models, one folder each, their implementations side by side."""
