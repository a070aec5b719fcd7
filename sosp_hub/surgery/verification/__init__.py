"""Whether a cut model computes what the masked model computes."""
