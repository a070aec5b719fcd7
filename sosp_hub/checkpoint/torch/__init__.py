"""Models of no library: their class is the reader's own code, their files are the same delta."""
