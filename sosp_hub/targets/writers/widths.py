"""Widths that formats ask for: what declares a target reads them without torch."""

DECI_STEP = 256
"""Readers of DeciLM round the width of a layer up to a multiple of this."""


def shared_out(num_kv: int, processes: int) -> bool:
    """Whether each process of tensor parallelism gets as many KV heads, or a copy of one."""
    return num_kv % processes == 0 or processes % num_kv == 0
