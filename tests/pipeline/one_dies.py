"""One of two processes is killed while the other waits for it."""

import os
import signal

import torch

from sosp_hub.distributed import process_state, process_sum

if __name__ == "__main__":
    rank = process_state().process_index
    for step in range(1_000_000):
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        process_sum(torch.ones(3))
