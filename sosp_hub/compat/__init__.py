"""One module per library: every name that the package uses and the library does not promise."""
