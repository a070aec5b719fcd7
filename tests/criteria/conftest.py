"""The criterion of a test is declared by that test alone, not when doctests are looked for."""

collect_ignore = ["toy.py"]
