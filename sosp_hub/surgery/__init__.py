"""The cut itself: tensors, attributes, verification."""
