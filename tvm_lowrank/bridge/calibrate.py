"""Statistics of every site, gathered by running calibration images through the torch bridge."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tvm_lowrank.bridge.answers import Answers
from tvm_lowrank.bridge.half import Fast
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.bridge.torch_nn import chain
from tvm_lowrank.graph import Site
from tvm_lowrank.methods import AnyMoments, Chain, ConvSpec, Moments, Pair, SampledMoments
from tvm_lowrank.methods.moments import shrunk_to_few, wide

if TYPE_CHECKING:
    from tvm_lowrank.data.images import Images

# of a batch: a hundred images of 32x32, or two of 224x224. What a layer makes of more of them, over 32 MB, comes from
# the system page by page and takes as long as the arithmetic (ResNet-50, 31 images at once: 1.4 times as long)
BATCH_PIXELS = 100 * 32 * 32
COLOURS = 3  # numbers of a pixel
MOST_AT_ONCE = 100
GATHERED = 512  # columns that are kept back until their products are added to a covariance
BLOCK = 1024  # rows of a covariance that are summed at once, and no further to the left than the diagonal needs
TRAINED_NUMBERS = 2**27  # in all variables of a network, for the images that are computed at once with gradients
SAMPLES = 32_000  # output positions of a site, in all images
POSITIONS = 32, 96  # at least and at most of an image, if it has so many: more of one image say little new
FISHER_POSITIONS = 64  # where gradients are looked at
# of the classes' probabilities: what a small change costs says little of scores that are far behind, until a larger one
# brings them to the front. At 4 and 8, sites of a ResNet-50 take 14 and 17 % less damage at the same rank than at 1,
# those of the bundled example 3 %, those of a ResNet-20 a half and none; the ResNet-50's last layer 58 and 65 %
TEMPERATURE = 8.0
SAMPLED_NUMBERS = 80_000_000  # in the columns of a site; three times as many samples as inputs where these are 4,608


def positions_of(spec: ConvSpec, size: Pair, images: int) -> int:
    """How many of the output positions of each image are sampled: fewer of wide sites with many images.

    `SAMPLED_NUMBERS` go into the columns of all samples, or a quarter of it into their outputs, of which a refit makes
    several arrays.
    """
    widest = max(int(np.prod(spec.weight_shape[1:])) * spec.groups, 4 * spec.out_channels)
    wanted = int(np.clip(SAMPLES // images, *POSITIONS))
    return max(1, min(wanted, math.prod(size), SAMPLED_NUMBERS // (widest * images)))


def sample_positions(
    site: str, first: int, count: int, size: Pair, seed: int = 0, *, draws: int
) -> tuple[Tensor, Tensor]:
    """Uniform output positions, (rows, columns) of (count, k) each, for the images number first, first + 1, …

    They depend on nothing but the arguments, so that two runs over the same batches look at the same positions.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{site}/{first}/{seed}".encode()))
    height, width = size
    order = torch.rand(count, height * width, generator=generator).argsort(dim=1)[:, :draws]
    return order // width, order % width


def sample_columns(x: Tensor, spec: ConvSpec, rows: Tensor, cols: Tensor) -> Tensor:
    """The columns that a convolution multiplies at some output positions.

    ``x`` is (n, C, H, W); ``rows`` and ``cols`` are (n, k) output positions of each image. Returns (g, n*k, D) with D
    in the order of an OIHW kernel's last three axes. Zero padding is part of a column.
    """
    top, left, bottom, right = spec.padding
    padded = F.pad(x, (left, right, top, bottom))
    height, width = spec.kernel
    down = rows[:, :, None, None] * spec.strides[0] + torch.arange(height).view(1, 1, -1, 1) * spec.dilation[0]
    across = cols[:, :, None, None] * spec.strides[1] + torch.arange(width).view(1, 1, 1, -1) * spec.dilation[1]
    image = torch.arange(len(x)).view(-1, 1, 1, 1)
    picked = padded.permute(0, 2, 3, 1)[image, down, across]  # n, k, kh, kw, C
    n, k = rows.shape
    grouped = picked.reshape(n * k, height, width, spec.groups, -1).permute(3, 0, 4, 1, 2)
    return grouped.reshape(spec.groups, n * k, -1)


def sample_values(values: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The values of (n, C, H, W) at the (n, k) positions of each image: (n*k, C)."""
    return values.permute(0, 2, 3, 1)[torch.arange(len(values)).view(-1, 1), rows, cols].flatten(0, 1)


def collect_moments(
    bridge: TorchBridge,
    sites: Sequence[Site],
    images: Images,
    *,
    seed: int = 0,
    advance: Callable[[int], object] = lambda done: None,
) -> dict[str, AnyMoments]:
    """Mean and covariance of the input columns of each site over calibration images.

    Parameters
    ----------
    images : float32 NCHW.
    advance : called with the number of images done after each batch.
    """
    return dict(each_moments(bridge, sites, images, seed=seed, advance=advance))


@torch.no_grad()
def each_moments(
    bridge: TorchBridge,
    sites: Sequence[Site],
    images: Images,
    *,
    seed: int = 0,
    advance: Callable[[int], object] = lambda done: None,
) -> Iterator[tuple[str, AnyMoments]]:
    """The moments of `collect_moments`, each with its site: those of all sites need not be in memory together."""
    wanted = {site.id: site for site in sites}
    counts = dict.fromkeys(wanted, 0)
    sums: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    gathered: dict[str, list[Tensor]] = {name: [] for name in wanted}
    start = 0

    def add(name: str) -> None:
        """Add the columns that were kept back to the sums."""
        columns = torch.cat(gathered[name], dim=1)
        gathered[name].clear()
        if name not in sums:
            groups, _, depth = columns.shape
            sums[name] = torch.zeros(groups, depth, dtype=torch.float64)
            products[name] = torch.zeros(groups, depth, depth)
        counts[name] += columns.shape[1]
        sums[name] += columns.double().sum(dim=1)
        _add_products(products[name], columns)

    def tap(name: str, inputs: Tensor, outputs: Tensor) -> None:
        if name not in wanted:
            return
        spec, size = wanted[name].spec, (outputs.shape[2], outputs.shape[3])
        draws = positions_of(spec, size, len(images))
        rows, cols = sample_positions(name, start, len(inputs), size, seed, draws=draws)
        gathered[name].append(sample_columns(inputs, spec, rows, cols))
        if not wide(spec) and sum(columns.shape[1] for columns in gathered[name]) >= GATHERED:
            add(name)

    for start, chunk in batches(images):  # noqa: B007 - the tap reads it
        bridge(chunk, tap=tap)
        advance(len(chunk))
    for name, columns in gathered.items():
        if wide(wanted[name].spec):
            yield name, SampledMoments.of(torch.cat(columns, dim=1).numpy())
            columns.clear()
            continue
        if columns:
            add(name)
        count = counts[name]
        mean = (sums[name] / count).numpy()
        covariance = np.triu(products.pop(name).numpy()).astype(np.float64) / count
        covariance += np.triu(covariance, 1).swapaxes(1, 2)
        covariance -= mean[:, :, None] * mean[:, None, :]
        yield name, Moments.of(mean, covariance, count)


def _add_products(sums: Tensor, columns: Tensor) -> None:
    """Add the products of (g, n, D) columns to the upper triangles of (g, D, D), and in part to what is below them.

    In place, in single precision: a covariance may have a hundred megabytes, which take as long as the arithmetic.
    """
    for total, own in zip(sums, columns, strict=True):
        for row in range(0, len(total), BLOCK):
            total[row : row + BLOCK, row:].addmm_(own[:, row : row + BLOCK].T, own[:, row:])


def collect_fisher(
    bridge: TorchBridge,
    sites: Sequence[Site],
    images: Images,
    *,
    seed: int = 0,
    advance: Callable[[int], object] = lambda done: None,
) -> dict[str, np.ndarray]:
    """Fisher information of the outputs of each site, (N, N): per image, summed over output positions.

    Answers are drawn from the network's own probabilities, by what its outputs mean, at `TEMPERATURE`, and the result
    is as large as at 1 on average: no labels are used. For a site that makes class scores (n, classes) nothing is
    drawn: the information of p is diag(p) - p p^T.

    Parameters
    ----------
    images : float32 NCHW.
    advance : called with the number of images done after each batch.
    """
    return dict(each_fisher(bridge, sites, images, seed=seed, advance=advance))


def each_fisher(
    bridge: TorchBridge,
    sites: Sequence[Site],
    images: Images,
    *,
    seed: int = 0,
    advance: Callable[[int], object] = lambda done: None,
) -> Iterator[tuple[str, np.ndarray]]:
    """The information of `collect_fisher`, each with its site: that of all sites need not be in memory together."""
    wanted = {site.id for site in sites}
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(wanted, 0)
    network, answers = Fast(deepcopy(bridge)), bridge.answers
    plain = answers == Answers() and len(bridge.outputs.shapes[0]) == 1  # class scores (n, classes)
    spread = torch.zeros(2, dtype=torch.float64)  # of the answers: at temperature 1, and at `TEMPERATURE`
    for start, chunk in batches(images, min(batch_of(images), trained_at_once(bridge))):
        chunk.requires_grad_(True)
        outputs: dict[str, Tensor] = {}

        def tap(name: str, _: Tensor, output: Tensor, outputs: dict[str, Tensor] = outputs) -> None:
            if name in wanted:
                outputs[name] = output

        answer = network(chunk, tap=tap)
        of_answer = None  # the gradient of the loss in the class scores
        loss, traces = answers.draw(answer, generator, temperature=TEMPERATURE)
        spread += traces
        gradients = torch.autograd.grad(loss, [*outputs.values(), *([answer] if plain else [])])
        if plain:
            of_answer, p = gradients[-1].float(), (answer.detach().float() / TEMPERATURE).softmax(dim=1)
        for name, gradient in zip(outputs, gradients, strict=False):
            if of_answer is not None and _same(gradient, of_answer):
                counts[name] += p.numel()
                product = torch.diag(p.sum(dim=0)) - p.T @ p
                sums[name] = sums[name].add_(product) if name in sums else product
                continue
            size = (gradient.shape[2], gradient.shape[3])
            rows, cols = sample_positions(
                name, start, len(chunk), size, seed, draws=min(math.prod(size), FISHER_POSITIONS)
            )
            values = sample_values(gradient, rows, cols).float()
            counts[name] += len(values)
            product = (values.T @ values).mul_(math.prod(size) / rows.shape[1])
            sums[name] = sums[name].add_(product) if name in sums else product
        advance(len(chunk))
    scale = float(spread[0] / spread[1]) if spread[1] > 0 else 1.0
    for name in list(sums):
        mean = (sums.pop(name) / len(images)).double().numpy() * scale
        yield name, shrunk_to_few(mean[None], counts[name])[0]


def _same(gradient: Tensor, of_answer: Tensor) -> bool:
    """Whether a site's gradient (n, N, H, W) is that of the answer, (n, N), to the precision of bfloat16."""
    near = 2 * torch.finfo(torch.bfloat16).eps
    return gradient.shape == (*of_answer.shape, 1, 1) and torch.allclose(
        gradient.flatten(1).float(), of_answer, rtol=near, atol=near**2
    )


@torch.no_grad()
def predict(bridge: TorchBridge, images: Images) -> np.ndarray:
    """The network's outputs for float32 NCHW images, in one array: several are joined (`tvm_lowrank.tensors`)."""
    return np.concatenate([bridge(chunk).numpy() for _, chunk in batches(images)])


def answered(bridge: TorchBridge, images: Images) -> Any:
    """The network's outputs as its user gets them: an array (n, …), or a tuple of several."""
    return bridge.outputs.given(predict(bridge, images))


@torch.no_grad()
def predict_each(bridge: TorchBridge, images: Images, site: str, chains: Sequence[Chain]) -> list[np.ndarray]:
    """The outputs with each of these chains in the place of a site; what comes before it is computed once."""
    instead = [chain(own.convs, own.bias_correction) for own in chains]
    parts = [bridge.forked(chunk, site, instead) for _, chunk in batches(images)]
    return [np.concatenate([part[i].numpy() for part in parts]) for i in range(len(chains))]


def batches(images: Images, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Images in batches of so many, or of `batch_of` them, each with the number of its first image.

    They are NCHW, but their channels lie next to each other: PyTorch computes faster so.
    """
    count = count or batch_of(images)
    for start in range(0, len(images), count):
        yield start, torch.from_numpy(images[start : start + count]).contiguous(memory_format=torch.channels_last)


def trained_at_once(bridge: TorchBridge) -> int:
    """How many images to compute at once where gradients are wanted, for which all that is computed is kept."""
    return max(1, TRAINED_NUMBERS // sum(bridge.sizes()))


def batch_of(images: Images) -> int:
    """How many images (n, C, H, W) to compute at once: two, or more small ones."""
    channels, height, width = images.shape[1:]
    pixels = max(height * width, channels * height * width // COLOURS)  # of several inputs, all numbers are channels
    return int(np.clip(BATCH_PIXELS // pixels, 2, MOST_AT_ONCE))
