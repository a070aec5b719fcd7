"""What the card says about a criterion: its formula, and where it comes from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A criterion in words.

    Attributes:
        formula: Saliency of one structure; higher is kept.
        words: What the symbols mean, and the source.
    """

    formula: str
    words: str


_GATE = "g is the gradient of the mean loss with respect to a gate on the structure's activation"

METHODS = {
    "sosp_h": Method(
        "|g_s| + 1/2 |r_s|,   r = H 1",
        f"{_GATE} (1 in the dense model), H the exact Hessian in the same gates, so that r_s also "
        "counts how s interacts with every other structure in every layer. Second-order structured "
        "pruning, [arXiv:2110.11395](https://arxiv.org/abs/2110.11395).",
    ),
    "taylor": Method(
        "(mean over batches of g_s)^2  or  |g_s|", f"{_GATE} (1 in the dense model); first order."
    ),
    "magnitude": Method("||w_s||_2", "w are the weights of the structure; no data is used."),
    "random": Method("uniform", "The control: no data and no weights are looked at."),
}


def method(name: str) -> Method | None:
    """What is known about a criterion; None for one that has no entry here."""
    return METHODS.get(name)
