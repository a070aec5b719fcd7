"""Files: the delta of a pruned model, its loaders, saving and loading; see format/FORMAT.md."""
