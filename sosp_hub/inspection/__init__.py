"""What a checkpoint holds and who can load it, without its weights."""
