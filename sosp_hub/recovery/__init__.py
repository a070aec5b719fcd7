"""Training that wins quality back, and never ends worse than it began."""
