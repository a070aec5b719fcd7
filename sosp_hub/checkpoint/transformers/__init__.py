"""Pruned transformers models: the hook that loads them, and how they are saved."""
