"""tensorly computes on numpy arrays here, and stays as its user set it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorly

from support.samples import columns, moments_of
from tvm_lowrank.methods import METHODS, ConvSpec, decompose
from tvm_lowrank.methods.solvers.algebra import mode_dot, multi_mode_dot, unfold
from tvm_lowrank.methods.solvers.evbmf import suggest_ranks

SPEC = ConvSpec(8, 12, (3, 3))
RANKS = {"tucker2": (4, 6), "btd": (4, 8, 2), "cp3": 6, "cp4": 6}


@pytest.fixture
def of_torch() -> Iterator[None]:
    tensorly.set_backend("pytorch")
    yield
    tensorly.set_backend("numpy")


def results() -> list[np.ndarray]:
    """What uses tensorly: the chains of some methods, with moments and without, and suggested ranks."""
    rng = np.random.default_rng(0)
    weight, known = rng.standard_normal(SPEC.weight_shape), moments_of(columns(SPEC, rng))
    chains = [
        decompose(weight, SPEC, method=method, rank=rank, moments=moments)
        for method, rank in RANKS.items()
        for moments in (None, known)
    ]
    # another rank of the same blocks starts from those that were found, the highest of CP is exact
    factors = METHODS["btd"].factorise(weight, SPEC, None)
    again = [*factors.weights((4, 8, 2)), *factors.weights((6, 8, 2))]
    exact = METHODS["cp3"].factorise(weight, SPEC, None).weights(METHODS["cp3"].max_rank(SPEC))
    return [*(conv.weight for chain in chains for conv in chain.convs), *again, *exact, np.array(suggest_ranks(weight))]


def test_decompositions_are_the_same_under_another_backend(request: pytest.FixtureRequest) -> None:
    expected = results()
    request.getfixturevalue("of_torch")
    with pytest.raises(TypeError):
        tensorly.unfold(np.zeros((2, 3)), 1)
    for found, plain in zip(results(), expected, strict=True):
        np.testing.assert_array_equal(found, plain)
    assert tensorly.get_backend() == "pytorch"


def test_a_backend_of_one_thread_is_not_given_to_others() -> None:
    def work() -> str:
        tensorly.set_backend("pytorch", local_threadsafe=True)
        unfold(np.zeros((2, 3, 4)), 1)
        return tensorly.get_backend()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == "pytorch"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(tensorly.get_backend).result() == "numpy"


@pytest.mark.usefixtures("of_torch")
def test_a_backend_is_restored_after_an_error() -> None:
    with pytest.raises(ValueError, match="not aligned"):
        mode_dot(np.zeros((2, 3)), np.zeros((4, 4)), 1)
    assert tensorly.get_backend() == "pytorch"


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_products_and_unfoldings_are_those_of_einsum_in_the_same_precision(kind: type) -> None:
    rng = np.random.default_rng(1)
    tensor, left, right = (rng.standard_normal(shape).astype(kind) for shape in ((4, 5, 3), (2, 4), (3, 6)))
    found = (
        unfold(tensor, 1),
        mode_dot(tensor, left, 0),
        multi_mode_dot(tensor, (left.T, right), (0, 2), transpose=True),
    )
    expected = (
        tensor.transpose(1, 0, 2).reshape(5, -1),
        np.einsum("ua,abc->ubc", left, tensor),
        np.einsum("ua,abc,cv->ubv", left, tensor, right),
    )
    for array, plain in zip(found, expected, strict=True):
        assert array.dtype == kind
        np.testing.assert_allclose(array, plain, atol=1e-5)
