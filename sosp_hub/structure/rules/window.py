"""Windows that slide over, resample or rearrange pictures and sequences."""

from sosp_hub.structure.axes import Prod, Sum, fixed, size_of, split, unify
from sosp_hub.structure.rules.registry import Operation, dims_of, position_of, rule, tensors
from sosp_hub.structure.terms import Terms

_RESAMPLE = (
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "max_pool1d", "max_pool2d", "mkldnn_max_pool2d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d",
    "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d",
)  # fmt: skip


@rule(*_RESAMPLE)
def _resample(terms: Terms, op: Operation) -> None:
    tensor = op.tensor
    axes = terms.of(tensor)
    flat = op.name.endswith("1d")
    num_spatial = 1 if flat else (3 if "3d" in op.name else 2)
    lead = list(axes[:-num_spatial])
    for result in tensors(op.out):
        sizes = result.shape[-num_spatial:]
        spatial = [
            terms.spatial(a, int(s), f"`{op.name}` resamples it")
            for a, s in zip(axes[-num_spatial:], sizes, strict=True)
        ]
        terms.set(result, [*lead, *spatial])


@rule("pixel_shuffle")
def _pixel_shuffle(terms: Terms, op: Operation) -> None:
    *lead, channels, height, width = terms.of(op.tensor)
    halves = split(channels, int(op.out.shape[-3]), op.name)
    assert halves is not None
    terms.fix(halves[1], "`pixel_shuffle` moves it into the picture")
    spatial = [
        terms.spatial(a, int(s), op.name)
        for a, s in zip((height, width), op.out.shape[-2:], strict=True)
    ]
    terms.set(op.out, [*lead, halves[0], *spatial])


@rule("pixel_unshuffle")
def _pixel_unshuffle(terms: Terms, op: Operation) -> None:
    *lead, channels, height, width = terms.of(op.tensor)
    factor = fixed(int(op.out.shape[-3]) // size_of(channels), f"`{op.name}` in {terms.where}")
    spatial = [
        terms.spatial(a, int(s), op.name)
        for a, s in zip((height, width), op.out.shape[-2:], strict=True)
    ]
    terms.set(op.out, [*lead, Prod((channels, factor)), *spatial])


@rule("im2col")
def _im2col(terms: Terms, op: Operation) -> None:
    *lead, channels, height, width = terms.of(op.tensor)
    window = fixed(int(op.out.shape[-2]) // size_of(channels), f"`unfold` in {terms.where}")
    terms.fix(Sum((height, width)), "`unfold` slides along it")
    terms.set(
        op.out,
        [
            *lead,
            Prod((channels, window)),
            fixed(int(op.out.shape[-1]), f"`unfold` in {terms.where}"),
        ],
    )


@rule("col2im")
def _col2im(terms: Terms, op: Operation) -> None:
    *lead, windows, places = terms.of(op.tensor)
    *_, channels, height, width = op.out.shape
    halves = split(windows, int(channels), f"`fold` in {terms.where}")
    assert halves is not None
    terms.fix(Sum((halves[1], places)), "`fold` puts it into the picture")
    spatial = [fixed(int(size), f"`fold` in {terms.where}") for size in (height, width)]
    terms.set(op.out, [*lead, halves[0], *spatial])


@rule("unfold")
def _unfold(terms: Terms, op: Operation) -> None:
    """Windows along one dimension; their elements become the last one."""
    tensor, dim, size, _ = op.args
    dim = position_of(dim, tensor)
    axes = list(terms.of(tensor))
    axes[dim] = terms.spatial(axes[dim], int(op.out.shape[dim]), "a window slides along it")
    terms.set(op.out, [*axes, fixed(int(size), f"a window in {terms.where}")])


@rule("roi_align", "roi_pool")
def _boxes(terms: Terms, op: Operation) -> None:
    tensor, boxes = op.args[:2]
    _, channels, *spatial = terms.of(tensor)
    terms.fix(Sum((*terms.of(boxes), *spatial)), "places of boxes are computed along it")
    for result in tensors(op.out):
        number, _, *places = (fixed(int(s), f"boxes in {terms.where}") for s in result.shape)
        terms.set(result, [number, channels, *places])


@rule("grid_sampler_2d", "grid_sampler_3d")
def _sample(terms: Terms, op: Operation) -> None:
    tensor, grid = op.args[:2]
    batch, channels, *spatial = terms.of(tensor)
    batch_too, *places, coordinates = terms.of(grid)
    unify(batch, batch_too, f"`{op.name}` in {terms.where}")
    terms.fix(Sum((coordinates, *spatial)), "positions are computed along it")
    terms.set(op.out, [batch, channels, *places])


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def _fourier(terms: Terms, op: Operation) -> None:
    axes = list(terms.of(op.tensor))
    for dim in dims_of(op.args[1], op.tensor):
        axes[dim] = terms.spatial(axes[dim], int(op.out.shape[dim]), "a Fourier transform over it")
    terms.set(op.out, axes)


@rule("view_as_real", "view_as_complex")
def _parts_of_complex(terms: Terms, op: Operation) -> None:
    axes = list(terms.of(op.tensor))
    if op.name == "view_as_real":
        axes.append(fixed(2, "real and imaginary part"))
    else:
        terms.fix(axes.pop(), "real and imaginary part")
    terms.set(op.out, axes)
