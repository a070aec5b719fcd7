"""The label that counts for nothing."""

IGNORED = -100  # as PyTorch and transformers have it
