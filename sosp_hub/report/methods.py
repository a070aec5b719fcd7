"""What the card says about a criterion: its formula, and what the symbols mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """A criterion in words.

    Attributes:
        formula: Saliency of one structure; higher is kept.
        words: What the symbols mean, and the source.
    """

    formula: str
    words: str


_PAPER = (
    "Second-order structured pruning, [arXiv:2110.11395](https://arxiv.org/abs/2110.11395); gates "
    "and their exact Hessian are this package's reading of it."
)


def _scaled(options: Mapping[str, Any]) -> str:
    return "; standardised within each group" if options.get("standardize", True) else ""


def method(name: str, options: Mapping[str, Any]) -> Method | None:
    """A criterion as it was run; None for one that has no entry here."""
    gate = (
        "g is the gradient of the mean loss over the calibration data with respect to a gate on "
        f"the structure's {'weights' if options.get('gate') == 'weight' else 'activation'} "
        "(1 in the dense model)"
    )
    match name:
        case "sosp_h":
            return Method(
                "|g_s| + 1/2 |r_s|,   r = H 1",
                f"{gate}, H the Hessian of that loss in the same gates, so that r_s also counts "
                f"how s interacts with every other structure in every layer. {_PAPER}",
            )
        case "sosp_i" if options.get("selection", "row_sum") == "row_sum":
            return Method(
                "|g_s| + 1/2 sum over s' of |Q_ss'|,   Q = mean over samples of J' R J",
                f"{gate}, J the Jacobian of the outputs by all gates, R the curvature of the loss "
                f"by the outputs. {_PAPER}",
            )
        case "sosp_i":
            return Method(
                "position in the order of removal",
                f"Q is the Gauss-Newton matrix of the loss in all gates; `{options['selection']}` "
                f"removes one structure after the other, least first. {_PAPER}",
            )
        case "taylor" if options.get("form") == "squared":
            return Method("mean over batches of (g_s)^2", f"{gate}, one batch at a time.")
        case "taylor":
            return Method("|g_s|", f"{gate}; first order.")
        case "fisher":
            return Method("mean over samples of (g_n,s)^2", f"{gate}, g_n of one sample's loss.")
        case "lamp":
            return Method(
                "||w_s||^2 / (sum over j of the group with ||w_j|| >= ||w_s|| of ||w_j||^2)",
                "w are the weights of the structure; no data is used.",
            )
        case "scp_score" | "scp":
            return Method(
                "c0 - Phi((t - beta_s) / (|gamma_s| + 1e-8))",
                "beta and gamma are of the BatchNorm in front of the structure's ReLU, so Phi is "
                "the probability that it is off"
                + (
                    "; the model was trained with masks." if name == "scp" else "; no data is used."
                ),
            )
        case "fpgm":
            words = "w are the weights of the structure; no data is used"
            return Method("sum over j of ||w_s - w_j||_2", f"{words}{_scaled(options)}.")
        case "activation":
            return Method(
                "sqrt(mean over samples of (mean over places of ||a_s||_2)^2)",
                f"a is what the structure hands on at a pixel or token{_scaled(options)}.",
            )
        case "eap":
            reading = (
                "A_n,s is the map of one sample"
                if options.get("reading") == "map"
                else "the rows of A_s are the maps of several samples"
            )
            return Method(
                "||A_s||_*, the sum of singular values, per sample", f"{reading}{_scaled(options)}."
            )
        case "wanda_sp":
            return Method(
                "sum over inputs j of s of (mean over rows i of |W_ij|) * sqrt(mean of x_j^2)",
                f"W are the weights that read the structure, x what they read{_scaled(options)}.",
            )
        case "flap":
            return Method(
                "sum over inputs j of s of Var(x_j) * ||W_:j||^2",
                f"W are the weights that read the structure, x what they read{_scaled(options)}.",
            )
        case "grasp":
            return Method("(H g)_s", f"{gate}, H the Hessian of that loss in the same gates.")
        case "hap":
            return Method(
                "1/2 H_ss",
                "H is the Hessian of the mean loss by the gates of structures; its diagonal is "
                "estimated with random signs (Hutchinson).",
            )
        case "block_influence":
            return Method(
                "1 - mean of cos(x_s, y_s)",
                "x goes into the layer and y comes out of it; the mean is over tokens.",
            )
        case "sglp":
            return Method(
                "rank of ||grad L|| inside its segment, below 0 where the layer goes",
                "segments are runs of layers with alike outputs (CKA, Fisher's partition); the "
                "gradient is that of a new net with the trained weights in the layer alone, or the "
                "layer's own in language models.",
            )
        case "magnitude":
            over = " / mean over the group" * (options.get("normalize") == "mean")
            what = "w are the weights of the structure; no data is used."
            return Method(f"||w_s||_2{over}", what)
        case "random":
            return Method("uniform", "The control: neither data nor weights are looked at.")
    return None
