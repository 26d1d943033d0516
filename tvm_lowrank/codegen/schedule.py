"""The schedule template: how a kernel is tiled so that its accumulators stay in the vector registers.

One template serves convolutions, matrix products and poolings. It keeps a (…, width, channel) tile of the output in
registers over the whole reduction and vectorises the channels; everything elementwise is inlined or computed on the
tile while it is still hot. A `Tiling` is all there is to choose, so a tuning record is one line of JSON, and the same
record applies to every kernel with the same key.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import IRModule
from tvm.s_tir import Schedule, ScheduleError
from tvm.s_tir.meta_schedule.postproc import RewriteLayout

from tvm_lowrank.codegen import ahead, tiles, units
from tvm_lowrank.codegen.blocks import call, put
from tvm_lowrank.codegen.kept import format_kept
from tvm_lowrank.codegen.rounding import ROUNDED
from tvm_lowrank.formats import FLOAT32

logger = logging.getLogger(__name__)

REDUCTION = 2  # tvm.tirx.IterVar.CommReduce
ROOT = "root"
# annotate the block of a convolution in half precision: its operands' format, the instructions that it may use, and how
# far a step of its positions, and one of its kernel, is in the input
FORMAT, UNITS, STRIDES, DILATIONS = "format", "units", "strides", "dilations"
PARTIAL = "partial"  # a block of sums of a few products in half precision, which another one adds up
INTERLEAVED = "interleaved_conv2d_nhwc"  # a block in which neighbouring channels belong to different groups
CHUNKS = 4  # for each thread, where threads shape registers before they work
# waking a thread takes some microseconds: kernels with less to do stay on one
PARALLEL_MACS = 2**19
PARALLEL_ELEMENTS = 2**15


@dataclass(frozen=True)
class Tiling:
    """The free choices of the template.

    ``tile`` is the register tile, one extent for each spatial axis of the reduction (for a convolution n, h, w, c);
    every extent divides its axis. ``vector`` is the number of float32 lanes that the last tile axis is cut into.
    ``channels_first`` runs over the channel tiles in the outer loop: weights stay in cache instead of activations.
    ``stripe`` is the number of output rows for which the padded input is prepared at a time; 0 pads all at once. Where
    every output channel reads one input channel only, and the channels come first, it is the input of one channel tile.
    ``unit`` names the instruction for dot products (`tvm_lowrank.codegen.units`), if one is used.
    """

    tile: tuple[int, ...]
    vector: int
    channels_first: bool = True
    stripe: int = 0
    unit: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Tiling:
        """The inverse of `to_json`; TypeError or KeyError if the entry is not one."""
        tile, vector = tuple(int(t) for t in entry["tile"]), int(entry["vector"])
        return cls(tile, vector, entry["channels_first"], entry["stripe"], str(entry.get("unit", "")))


@dataclass(frozen=True)
class Workload:
    """The iteration space of a kernel that the template can tile.

    ``spatial`` and ``reduction`` are the extents of the axes; ``group`` is the number of output channels that read the
    same input channels (a tile must not cross it); ``padded`` says whether a zero-padded copy of the input is made;
    ``format`` is that of the operands, and ``units`` names the instructions for dot products that may be used.
    """

    spatial: tuple[int, ...]
    reduction: tuple[int, ...]
    group: int
    padded: bool
    format: str = FLOAT32
    units: tuple[str, ...] = ()

    @property
    def macs(self) -> int:
        return prod(self.spatial) * prod(self.reduction)

    @property
    def channelwise(self) -> bool:
        """Whether every output channel reads one input channel only: depthwise convolutions and poolings."""
        return _channelwise(self.reduction)


def _channelwise(reduction: Sequence[int]) -> bool:
    return len(reduction) == 2 or reduction[-1] == 1  # (kh, kw) or (kh, kw, channels)


def _blocks(sch: Schedule) -> list[Any]:
    return list(sch.get_child_blocks(sch.get_sblock(ROOT)))


def _reductions(sch: Schedule, blocks: Sequence[Any]) -> list[int]:
    """Positions of the blocks that reduce."""
    return [i for i, b in enumerate(blocks) if any(int(v.iter_type) == REDUCTION for v in sch.get(b).iter_vars)]


def block_names(func: IRModule) -> list[str]:
    """Names of the blocks of a kernel, in order."""
    sch = Schedule(func, debug_mask="none")
    return [str(sch.get(block).name_hint) for block in _blocks(sch)]


def workload(func: IRModule) -> Workload | None:
    """The iteration space of a kernel's reduction, or None if it has none or several (elementwise, softmax)."""
    sch = Schedule(func, debug_mask="none")
    blocks = _blocks(sch)
    partial = _partial(sch, blocks)
    reductions = [i for i in _reductions(sch, blocks) if blocks[i] != partial]
    if len(reductions) != 1:
        return None
    block = sch.get(blocks[reductions[0]])
    extents = [int(v.dom.extent) for v in block.iter_vars]
    kinds = [int(v.iter_type) == REDUCTION for v in block.iter_vars]
    spatial = tuple(e for e, reduces in zip(extents, kinds, strict=True) if not reduces)
    if not spatial or kinds != sorted(kinds):
        return None
    reduction, format, names = tuple(extents[len(spatial) :]), FLOAT32, ""
    if FORMAT in block.annotations:  # the innermost axis is that of a dot product
        format, names = str(block.annotations[FORMAT]), str(block.annotations[UNITS])
        reduction = (*reduction[:-2], reduction[-2] * reduction[-1])
    group = spatial[-1]
    if "conv2d_nhwc" in str(block.name_hint):
        products = block if partial is None else sch.get(partial)
        data, weight = (region.source for region in products.reads)
        if partial is not None:
            format, reduction = str(products.annotations[FORMAT]), tuple(map(int, weight.shape[:3]))
        groups = int(data.shape[-1]) // int(weight.shape[2])  # NHWC, HWIO
        # in a depthwise convolution every lane reads its own input channel, which is one vector load again
        group = spatial[-1] // groups if groups < spatial[-1] else spatial[-1]
        if str(block.name_hint) == INTERLEAVED:
            group = groups
    padded = any(_pads(sch, b) for b in blocks[: reductions[0]])
    return Workload(spatial, reduction, group, padded, format, tuple(filter(None, names.split(","))))


def _partial(sch: Schedule, blocks: Sequence[Any]) -> Any:
    """The block of partial sums in half precision, or None."""
    return next((block for block in blocks if str(sch.get(block).name_hint) == PARTIAL), None)


def _pads(sch: Schedule, block: Any) -> bool:
    """Whether a block makes a larger copy of the input; without padding it is a mere copy, and inlined."""
    stmt = sch.get(block)
    if not str(stmt.name_hint).startswith("pad_temp"):
        return False
    before, after = stmt.reads[0].source.shape, stmt.writes[0].source.shape
    return any(int(b) != int(a) for b, a in zip(before, after, strict=True))


def default_tiling(space: Workload, lanes: int) -> Tiling:
    """A reasonable tile for a kernel that was not tuned: two vectors of channels, up to four columns."""
    vector = largest_divisor(space.group, units.lanes_of(space.format, lanes))
    channels = vector * largest_divisor(space.group // vector, 2)
    unit = next((name for name in space.units if units.UNITS[name].lanes == vector), "")
    tile = [1] * len(space.spatial)
    tile[-1] = channels
    if len(tile) > 1:
        tile[-2] = largest_divisor(space.spatial[-2], 4)
    return Tiling(tuple(tile), vector, unit=unit)


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most limit."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)


def apply(func: IRModule, tiling: Tiling | None, *, target: tvm.target.Target, threads: int) -> IRModule:
    """Schedule the only PrimFunc of a module.

    ``tiling`` None means a kernel that has no reduction, or several: what is elementwise in it is vectorised for the
    target and spread over the threads.

    Raises
    ------
    tvm.s_tir.ScheduleError, ValueError
        If the tiling does not fit the kernel.
    """
    sch = Schedule(func, debug_mask="none")
    lanes = target_lanes(target)
    if tiling is None:
        _elementwise(sch, lanes=lanes, threads=threads)
        tile, walk = None, None
    else:
        rounding = _rounding(sch, tiling, target)
        tile, walk = _tiled(sch, tiling, rounding, lanes=lanes, threads=threads)
    # packs the constant operands in the order in which the tile reads them
    RewriteLayout().apply(sch)
    if walk is not None:
        ahead.fetch(sch, walk)
    functions = [] if tiling is None or rounding is None else [rounding.code(target)]
    if tiling is not None and tile is not None:
        multiply = _products if isinstance(tile, _Tiles) else _dot
        functions.append(multiply(sch, tile, units.UNITS[tiling.unit], target))
    if functions:
        sch.annotate(sch.get_loops(_blocks(sch)[-1])[0], "pragma_import_llvm", "".join(functions))
    return sch.mod


def apply_default(func: IRModule, *, target: tvm.target.Target, threads: int) -> IRModule:
    """Schedule a kernel that was not tuned as well as can be guessed; one that no template fits stays as it is."""
    space = workload(func)
    choices = [None] if space is None else [default_tiling(space, target_lanes(target)), None]
    for tiling in choices:
        try:
            return apply(func, tiling, target=target, threads=threads)
        except (ScheduleError, ValueError) as error:
            logger.debug("%s does not fit: %s", tiling, error)
    logger.warning("no schedule fits the kernel with blocks %s; it runs unoptimised", ", ".join(block_names(func)))
    return func


@dataclass(frozen=True)
class _Tiles:
    """Where products of tiles are to take place: instead of ``loop``; ``parallel`` are the loops for the threads.

    ``again`` says whether the weights of a tile of channels are read again and again before the next ones.
    """

    loop: Any
    nest: tiles.Nest
    outermost: Any
    parallel: Sequence[Any]
    threads: int
    again: bool


def _rounding(sch: Schedule, tiling: Tiling, target: tvm.target.Target) -> units.Rounding | None:
    """The instruction for the last block of a kernel, if that only rounds what the one before it makes."""
    last = sch.get(_blocks(sch)[-1])
    if not str(last.name_hint).startswith(ROUNDED) or int(last.iter_vars[-1].dom.extent) % tiling.vector:
        return None
    return units.rounding_of(target, format_kept(str(last.writes[0].source.ty.dtype)), tiling.vector)


def _tiled(
    sch: Schedule, tiling: Tiling, rounding: units.Rounding | None, *, lanes: int, threads: int
) -> tuple[Any, ahead.Walk | None]:
    """Tile a kernel; the loop over the lanes that an instruction for dot products takes the place of, or None.

    Of an instruction that multiplies tiles it is their `_Tiles`. Besides, how the kernel runs over its tiles, if it
    reads the weights of a tile of channels again and again.
    """
    unit = units.UNITS.get(tiling.unit)
    blocks = _blocks(sch)
    partial = _partial(sch, blocks)
    (position,) = (i for i in _reductions(sch, blocks) if blocks[i] != partial)
    anchor, after = blocks[position], blocks[position + 1 :]
    before = [block for block in blocks[:position] if block != partial]
    pad = next((block for block in before if _pads(sch, block)), None)
    if pad is None and tiling.unit:
        # an instruction reads its operands as they are: what makes them is done before
        pad = next((block for block in before if anchor in sch.get_consumers(block)), None)
    for block in before:
        if block != pad:
            sch.compute_inline(block)
    rounded = None if rounding is None else after.pop()
    for block in after[:-1]:
        sch.compute_inline(block)
    epilogue = after[-1] if after else None if rounded else sch.cache_write(anchor, 0, "global")
    operands = sch.get(anchor if partial is None else partial).reads

    loops = sch.get_loops(anchor)
    work = prod(int(sch.get(loop).extent) for loop in loops)
    spatial, reduction = loops[: len(tiling.tile)], loops[len(tiling.tile) :]
    channelwise = partial is None and _channelwise([int(sch.get(loop).extent) for loop in reduction])
    outer, inner = [], []
    for loop, factor in zip(spatial, tiling.tile, strict=True):
        if int(sch.get(loop).extent) % factor:
            raise ValueError(f"tile {tiling.tile} does not divide the kernel")
        tiles, within = sch.split(loop, [None, factor])
        outer.append(tiles)
        inner.append(within)
    vectors, lane = sch.split(inner.pop(), [None, tiling.vector])
    inner += [vectors, lane]
    if unit is not None:
        inner.append(reduction.pop())
    nest = None
    if unit is not None and unit.rows > 1:
        nest = _nest(sch, anchor, tiling, unit, [int(sch.get(loop).extent) for loop in reduction])
        position = len(spatial) - 2
        inner[position : position + 1] = sch.split(inner[position], [None, nest.rows])
        steps, step = sch.split(reduction.pop(), [None, nest.steps[1]])
        reduction.append(steps)
        inner[-2:-2] = [step]

    head, channel = outer[:-1], outer[-1]
    leading: list[Any] = []  # outside of the padding
    if tiling.stripe and pad is not None:
        stripes, rows = sch.split(head[1], [None, tiling.stripe // tiling.tile[1]])
        leading, head = [head[0], stripes], [rows, *head[2:]]
    order = [*leading, channel, *head] if tiling.channels_first else [*leading, *head, channel]
    sch.reorder(*order, *reduction, *inner)
    summed = reduction
    if partial is not None:
        summed = [*reduction, *_tile_partial(sch, partial, reduction[-1], tiling, len(inner))]
    if leading and tiling.channels_first and channelwise:
        leading.append(channel)
    if leading:
        sch.compute_at(pad, leading[-1], preserve_unit_loops=True)
        _vectorise(sch, sch.get_loops(pad)[-1], lanes)
    elif pad is not None:
        _spread(sch, sch.get_loops(pad), lanes=lanes, threads=threads)
    if epilogue is not None:
        sch.reverse_compute_at(epilogue, order[-1], preserve_unit_loops=True)
        _vectorise(sch, sch.get_loops(epilogue)[-1], tiling.vector)
    if rounding is not None:
        sch.reverse_compute_at(rounded, order[-1], preserve_unit_loops=True)
        _, own = sch.split(sch.get_loops(rounded)[-1], [None, tiling.vector])
        put(sch, sch.blockize(own), ROUNDED, _rounding_call(rounding))
    if not tiling.unit:
        sch.vectorize(lane)
    parallel = (leading or order) if threads > 1 and work >= PARALLEL_MACS else []
    if nest is not None:
        again = tiling.channels_first and not leading
        return _Tiles(reduction[0], nest, sch.get_loops(anchor)[0], parallel, threads, again), None
    walked, positions = [channel, *head], prod(int(sch.get(loop).extent) for loop in head)
    if parallel:
        fused = sch.fuse(*parallel) if len(parallel) > 1 else parallel[0]
        walked = walked if leading else [fused]
        sch.parallel(fused)
    again = tiling.channels_first and not channelwise and len(operands) > 1
    walk = ahead.Walk(walked, positions, summed, operands[1].source) if again else None
    start = sch.decompose_reduction(anchor, sch.get_loops(anchor)[-len(reduction) - len(inner)])
    if not tiling.unit:
        return None, walk
    sch.vectorize(sch.get_loops(start)[-1])
    return lane, walk


def _tile_partial(sch: Schedule, block: Any, loop: Any, tiling: Tiling, count: int) -> tuple[Any, Any]:
    """Compute the partial sums of a tile within a loop over them; the tile has as many loops as ``count``.

    Returns the loops over what they add up.
    """
    sch.compute_at(block, loop, preserve_unit_loops=True)
    loops = sch.get_loops(block)
    *spatial, channel, _, _ = loops[-count - 3 : -2]  # then the two of the loops around it, of one step each
    vectors, lane = sch.split(channel, [None, tiling.vector])
    columns, inside = loops[-2:]
    sch.reorder(columns, inside, *spatial, vectors, lane)
    sch.vectorize(lane)
    sch.decompose_reduction(block, columns)
    return columns, inside


def _rounding_call(rounding: units.Rounding) -> Callable[..., Any]:
    def make(source: Any, result: Any) -> Any:
        first = [(0,) * len(buffer.ty.shape) for buffer in (result, source)]
        return call(rounding.function, *(tirx.address_of(b[at]) for b, at in zip((result, source), first, strict=True)))

    return make


def _dot(sch: Schedule, lane: Any, unit: units.Unit, target: tvm.target.Target) -> str:
    """Put an instruction for dot products in the place of the innermost loops, from that over the lanes on.

    Returns the functions that it needs, in LLVM IR.
    """
    sch.tensorize(lane, units.tensor_intrin(unit.name))
    return unit.code(target)


def _nest(sch: Schedule, block: Any, tiling: Tiling, unit: units.Unit, reduction: Sequence[int]) -> tiles.Nest:
    """The loops that products of tiles take the place of; ``reduction`` are the extents of those but the last one."""
    *kernel, steps = reduction
    *positions, channels = tiling.tile
    if tiling.vector != unit.lanes or channels % unit.lanes:
        raise ValueError(f"{unit.name} has {unit.lanes} lanes, not {tiling.vector}")
    step = largest_divisor(steps, unit.steps)
    annotations, rest = sch.get(block).annotations, (1,) * (len(positions) - 2)
    strides, dilations = ((*rest, *map(int, str(annotations[name]).split(","))) for name in (STRIDES, DILATIONS))
    return tiles.Nest(
        kernel=tuple(kernel),
        steps=(steps // step, step),
        positions=tuple(positions),
        rows=largest_divisor(positions[-1], unit.rows),
        vectors=channels // unit.lanes,
        strides=strides,
        dilations=dilations,
    )


def _products(sch: Schedule, place: _Tiles, unit: units.Unit, target: tvm.target.Target) -> str:
    """Put products of tiles in the place of the innermost loops; the functions that they need, in LLVM IR."""
    nest, within = place.nest, place.outermost
    block = sch.blockize(place.loop)
    if place.parallel:
        # each thread shapes its registers, and should not do so for every tile
        within = sch.fuse(*place.parallel) if len(place.parallel) > 1 else place.parallel[0]
        count, least = int(sch.get(within).extent), place.threads * CHUNKS
        if count > least:
            chunks = next(d for d in range(least, count + 1) if count % d == 0)
            within, _ = sch.split(within, [chunks, None])
        sch.parallel(within)
    tiles.place(sch, block, nest, unit, again=place.again)
    tiles.begin(sch, within, nest, unit)
    return tiles.functions(unit, target, rows=nest.rows, steps=nest.steps[1])


def _elementwise(sch: Schedule, *, lanes: int, threads: int) -> None:
    """Inline what is used once, then schedule the remaining blocks one by one; reductions stay as they are."""
    blocks = _blocks(sch)
    reductions = [blocks[i] for i in _reductions(sch, blocks)]
    for block in blocks[:-1]:
        consumers = sch.get_consumers(block)
        if block not in reductions and len(consumers) == 1 and not _reductions(sch, consumers):
            sch.compute_inline(block)
    remaining = _blocks(sch)
    reducing = _reductions(sch, remaining)
    for i, block in enumerate(remaining):
        loops = sch.get_loops(block)
        if i in reducing or not loops:
            continue
        if int(sch.get(loops[-1]).extent) % lanes:
            loops = [sch.fuse(*loops)]  # a short last axis would leave most lanes empty
        _spread(sch, loops, lanes=lanes, threads=threads)


def _spread(sch: Schedule, loops: Sequence[Any], *, lanes: int, threads: int) -> None:
    """Vectorise the last loop and run the others in parallel, if there is enough to do for several threads."""
    work = prod(int(sch.get(loop).extent) for loop in loops)
    outer = [*loops[:-1], *_vectorise(sch, loops[-1], lanes)[:-1]]
    if threads > 1 and outer and work >= PARALLEL_ELEMENTS:
        sch.parallel(sch.fuse(*outer) if len(outer) > 1 else outer[0])


def _vectorise(sch: Schedule, loop: Any, lanes: int) -> list[Any]:
    """Vectorise as many lanes of a loop as divide it; the pieces, outermost first."""
    vector = largest_divisor(int(sch.get(loop).extent), lanes)
    if vector == 1:
        return [loop]
    tiles, lane = sch.split(loop, [None, vector])
    sch.vectorize(lane)
    return [tiles, lane]


def target_lanes(target: tvm.target.Target) -> int:
    """float32 lanes of a CPU target's vectors (TVM's own ``llvm_get_vector_width`` says 512 bits for every x86)."""
    features = tvm.target.codegen.llvm_get_cpu_features(target)
    return 16 if "avx512f" in features else 8 if "avx" in features else 4
