"""Data sets: what they hold, and batches as a model takes them."""
