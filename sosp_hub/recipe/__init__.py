"""Recipes: typed schema, loading, all faults at once. Loads without torch."""
