"""The delta of a pruned model, its bounds, and headers of weight files; see FORMAT.md."""
