"""Making the scores of different groups comparable."""

from typing import TYPE_CHECKING

from sosp_hub.errors import CriterionError

if TYPE_CHECKING:
    from sosp_hub.types import Saliency


def standardized(saliency: "Saliency", what: str) -> "Saliency":
    """Mean 0 and standard deviation 1 within each group; a group of one structure gets 0.

    Args:
        saliency: One tensor per group.
        what: What was measured, for the message.

    Raises:
        CriterionError: A group whose structures are all alike, so that there is nothing to rank.
    """
    result = {}
    for name, scores in saliency.items():
        centred = scores - scores.mean()
        spread = centred.square().mean().sqrt()
        if len(scores) > 1 and spread <= 1e-12 * scores.abs().max():
            raise CriterionError(
                f"group {name!r}: {what} has zero variance over its {len(scores)} structures, so "
                "it cannot rank them; look at the weights and the data, write standardize=False, "
                "or score other kinds (`kinds=`)"
            )
        result[name] = centred / spread if len(scores) > 1 else centred
    return result
