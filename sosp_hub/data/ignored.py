"""The label that counts for nothing."""

IGNORED = -100  # as PyTorch and transformers have it
IGNORED_PIXEL = 255  # of a mask with 8 bits
