"""Where a pruned model is served: constraints that a plan meets, a writer, and what it takes."""
