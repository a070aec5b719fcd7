"""What decides which structures matter: one criterion a file, under its own name."""
