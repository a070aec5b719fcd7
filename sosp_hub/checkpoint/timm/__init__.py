"""Pruned timm models: the entry point that loads them, and how they are saved."""
