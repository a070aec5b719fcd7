"""Files: the delta of a pruned model, its loaders, saving and loading. The format is in FORMAT.md."""
