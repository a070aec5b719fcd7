"""What belongs together in a model: axis algebra, trace, groups."""
