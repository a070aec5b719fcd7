"""Nuclear norm of feature maps."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sosp_hub.recipe.criteria import CRITERIA, Method, Needs, WatchedCriterion
from sosp_hub.recipe.section import Count

if TYPE_CHECKING:
    from torch import Tensor

    from sosp_hub.criteria.compute.activations import Seen
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency

_STRUCTURES = 64  # feature maps of so many structures are copied at once


@CRITERIA.declare
class Eap(WatchedCriterion):
    """Nuclear norm of what a structure hands on, its sum of singular values per sample.

    ``set``: the maps of samples are the rows of one matrix of each structure, samples by places:
    of up to ``set_size`` samples of a batch, or, where that is null, of all of them, whose Gram
    matrix (places by places) is added up batch by batch. ``map``: every map is a matrix of its own,
    height by width (tokens by positions of a structure in transformers). Norms are divided by the
    root of the size of a map, so that places where a group is read in maps of different sizes
    count alike. Singular values are the roots of the eigenvalues of the smaller Gram matrix, which
    is made in the maps' precision (float32 at least): of float32 maps, singular values below a few
    1e-4 of the largest are rounding. ``set`` costs about as much as the forward pass, ``map``
    several times that.

    Paper: Yeom et al., "Toward Compact Deep Neural Networks via Energy-Aware Pruning", arXiv
    2103.10858. Which matrix is meant is our reading of the abstract, which is why there are two.

    Differs from the paper: the map is where it is read, after normalisation and activation function
    (our choice); heads, neurons and groups that are read in several places are scored too; padding
    does not count; scores are standardised within each group; sets of 32 samples, so that large
    maps fit: their scores depend on how the data is cut into batches (``set_size: null`` is the
    paper's one set, and does not). Seen here: after a cut without fine-tuning it is level with or
    behind random once norms are re-estimated, and after fine-tuning level with all
    (``recipes/papers/README.md``).
    """

    paper: ClassVar[str] = "arXiv 2103.10858"
    needs: ClassVar[Needs] = "inputs"
    formula: ClassVar[str] = "||A_s||_* / sqrt(size of a map), per sample"
    words: ClassVar[str] = (
        "||.||_* is the sum of singular values; the rows of A_s are the maps of several samples"
    )

    name: Literal["eap"] = "eap"
    reading: Literal["set", "map"] = Field(
        default="set", description="one matrix of several samples' maps, or one of each map"
    )
    set_size: Count | None = Field(
        default=32, description="most samples of one matrix with `set`; null = all, as the paper"
    )

    def saliency(self, context: "Context") -> "Saliency":
        """One forward pass per batch."""
        from sosp_hub.criteria.compute.activations import mean_of_sites, site_means
        from sosp_hub.criteria.compute.ranking import standardized

        if self.reading == "set" and self.set_size is None:
            means = _norms_of_one_set(context)
        else:
            means = site_means(
                context.model, context.groups, context.batches, self._measure, context.process_sum
            )
        scores = mean_of_sites(means)
        if not self.standardize:
            return scores
        return standardized(scores, "the nuclear norm of feature maps")

    def method(self) -> Method:
        """By its reading."""
        of_map = "||.||_* is the sum of singular values; A_s is the map of one sample"
        return Method(self.formula, self.scaled(of_map if self.reading == "map" else self.words))

    def _measure(self, seen: "Seen") -> "tuple[Tensor, int]":
        import torch

        norms = []
        structures = seen.by_structure()  # (structures, samples, places, each)
        sizes = (seen.places * structures.shape[-1]).clamp(min=1).to(torch.float64)
        for part in structures.split(_STRUCTURES):
            if self.reading == "map":
                is_image = len(seen.shape) == 2 and part.shape[-1] == 1
                maps = part.unflatten(2, seen.shape).squeeze(-1) if is_image else part
                norms.append((_nuclear_norms(maps) / sizes.sqrt()).sum(-1))
            else:
                sets = part.flatten(2).split(self.set_size or part.shape[1], 1)
                roots = [of_set.mean().sqrt() for of_set in sizes.split(sets[0].shape[1])]
                norms.append(
                    torch.stack(
                        [_nuclear_norms(a) / root for a, root in zip(sets, roots, strict=True)]
                    ).sum(0)
                )
        return torch.cat(norms), len(seen.rows)


def _norms_of_one_set(context: "Context") -> "dict[str, dict[int, Tensor]]":
    """Nuclear norms of all samples' maps as one matrix, by group and number of the site."""
    from sosp_hub.criteria.compute.activations import site_grams

    grams, num_samples = site_grams(context)
    return {
        name: {number: _from_gram(gram) / num_samples for number, gram in of_sites.items()}
        for name, of_sites in grams.items()
    }


def _nuclear_norms(matrices: "Tensor") -> "Tensor":
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    return _from_gram(wide @ wide.mT)


def _from_gram(gram: "Tensor") -> "Tensor":
    """Sums of singular values, the roots of the eigenvalues."""
    import torch

    gram = gram.to(torch.float64)
    if not gram.isfinite().all():  # said by `score`; eigenvalues would not converge
        return gram.new_full(gram.shape[:-2], torch.nan)
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(-1)
