"""SGLP: layers fall into segments of alike outputs, and each segment gives up its least."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from sosp_hub.recipe.criteria import CRITERIA, Criterion, Needs
from sosp_hub.recipe.section import Count, Share
from sosp_hub.types import Kind

if TYPE_CHECKING:
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.criteria.compute.layer_segments import Partition
    from sosp_hub.types import Saliency


@CRITERIA.declare
class Sglp(Criterion):
    """Layers fall into segments of alike outputs (CKA); in each those with the least gradient go.

    Segments: Fisher's optimal partition of the blocks' row sums of the CKA matrix. Layers,
    ``fresh``: the subset of a segment's layers is kept with the largest gradient norm when its
    pretrained weights stand in a net that is otherwise freshly initialised. ``pretrained``: the
    layers are kept whose own weights have the largest gradient norm in the pretrained net; for
    language models (our choice). The first block always stays.

    Scores are below 0 for the layers that go by SGLP's own quota (``keep``, in proportion to the
    segments, or ``kept_per_segment``; a block stays of each): ``budget: {threshold: 0}`` removes
    exactly these. With any other budget they go first, one at a time, from all segments in
    proportion; then the others, until the budget holds.

    Paper: Li et al., "SGLP: A Similarity Guided Fast Layer Partition Pruning for Compressing Large
    Deep Models", arXiv 2410.14720.

    Differs from the paper: calibration samples are training samples; the partition is the exact
    optimum (the authors' code does not back-track); the fresh net is the same for all subsets; the
    number of segments is the last that saves 5 % of the variation without borders (our reading);
    the stem compares but is in no segment; the first block stays; a segment with more than
    ``max_subsets`` subsets gives up one layer at a time, each time the one without which the norm
    is largest, and says so; norms can be means over several fresh nets (``num_fresh``); tokens are
    the rows where blocks work on tokens.
    Blocks that change width or stride stay. Weights that no module can reset (class tokens,
    scales) are not fresh.
    """

    paper: ClassVar[str] = "arXiv 2410.14720"
    needs: ClassVar[Needs] = "labels"
    first_order: ClassVar[bool] = True
    formula: ClassVar[str] = "rank of ||grad L|| inside its segment, below 0 where the layer goes"
    words: ClassVar[str] = (
        "segments are runs of layers with alike outputs (CKA, Fisher's partition); the gradient is "
        "that of a new net with the trained weights in the layer alone, or the layer's own in "
        "language models."
    )
    kinds: ClassVar[tuple[Kind, ...]] = ("layer",)
    signed: ClassVar[bool] = True
    decides_budget: ClassVar[bool] = True

    name: Literal["sglp"] = "sglp"
    keep: Share = Field(
        default=0.5, description="share of the layers that stays where budget.threshold decides"
    )
    kept_per_segment: Annotated[tuple[int, ...], Field(strict=False)] | None = Field(
        default=None, description="blocks that each segment keeps instead"
    )
    num_segments: Count | None = Field(default=None, description="null = automatic")
    max_segments: Count | None = Field(
        default=None, description="of the automatic number; null = a third of the blocks"
    )
    max_subsets: Count = Field(
        default=20,
        description="above so many subsets of a segment, layers go one at a time; a log line tells",
    )
    num_fresh: Count = Field(
        default=1, description="new nets, of seeds that follow, whose norms are averaged"
    )
    max_rows: Count = Field(
        default=500, description="samples (or tokens) of a batch whose similarity is compared"
    )
    norm_samples: Count = Field(default=128, description="samples of a gradient norm")
    norms: Literal["auto", "fresh", "pretrained"] = Field(
        default="auto", description="of layers in a new net, or (language models) as they are"
    )

    def saliency(self, context: "Context") -> "Saliency":
        """One forward pass per batch, then the gradient norms."""
        from sosp_hub.criteria.compute.layer_segments import segment_scores

        return segment_scores(context.groups, self.partition(context))

    def partition(self, context: "Context") -> "Partition":
        """The segments and what goes from each, with all that led to it."""
        from sosp_hub.criteria.compute.layer_segments import partition

        return partition(context, **self.options())
