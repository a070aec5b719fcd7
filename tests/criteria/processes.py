"""A criterion on several processes, without processes: threads that add up what they exchange."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from sosp_hub.scoring import score


def in_processes(toy, name, **options):
    """The scores of three processes: one sample, the rest in two batches, and no data at all."""
    inputs, labels = toy.batch
    shares = [
        [(inputs[:1], labels[:1])],
        [(inputs[1:3], labels[1:3]), (inputs[3:], labels[3:])],
        [],
    ]
    barrier, sent = threading.Barrier(len(shares), timeout=60), {}

    def process(rank):
        def process_sum(flat):
            sent[rank] = flat
            barrier.wait()
            total = torch.stack([sent[other] for other in range(len(shares))]).sum(0)
            barrier.wait()
            return total

        return score(
            copy.deepcopy(toy.model),
            toy.graph,
            shares[rank],
            name,
            loss_fn=F.cross_entropy,
            process_sum=process_sum,
            **options,
        )

    with ThreadPoolExecutor(len(shares)) as pool:
        found = list(pool.map(process, range(len(shares))))
    for other in found[1:]:
        for key, value in found[0].items():
            assert torch.equal(other[key], value)
    return found[0]
