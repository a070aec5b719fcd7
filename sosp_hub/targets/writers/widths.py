"""Widths that formats ask for: what declares a target reads them without torch."""

DECI_STEP = 256
"""Readers of DeciLM round the width of a layer up to a multiple of this."""
