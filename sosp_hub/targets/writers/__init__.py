"""Files that other readers take."""
