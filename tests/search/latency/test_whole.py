import dataclasses

import numpy as np
import pytest
from torch import nn

from support.lowering_networks import canonical, network
from tvm_lowrank.codegen.lower import kernels, lower
from tvm_lowrank.errors import UserError
from tvm_lowrank.searching.latency.whole import CACHED, Measured, Traffic, WholeNetworks, fit
from tvm_lowrank.targets.profile import load_profile

TARGET = load_profile("x86").tvm_target()


def libraries(count, coefficients, noise=0.0):
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        kernels_ms, traffic = generator.uniform(1, 30), Traffic(*generator.uniform((1, 1, 0.1), (50, 50, 0.9)))
        beyond = float(np.dot(coefficients, dataclasses.astuple(traffic)))
        found.append(Measured(kernels_ms, (kernels_ms + beyond) * (1 + noise * generator.standard_normal()), traffic))
    return found


def test_fit_finds_what_a_megabyte_costs():
    found = fit(libraries(20, (0.02, 0.05, 1.0)))
    np.testing.assert_allclose(found, (0.02, 0.05, 1.0), rtol=0.1)
    noisy = fit(libraries(40, (0.02, 0.05, 1.0), noise=0.01))
    np.testing.assert_allclose(noisy[:2], (0.02, 0.05), rtol=0.4)


def test_nothing_is_known_without_libraries_and_nothing_is_negative():
    assert not fit([]).any()
    faster = [Measured(10.0, 9.5, Traffic(10.0, 10.0, 0.2))]
    assert not fit(faster).any()


def test_traffic_counts_weights_and_what_leaves_the_caches():
    net = network(nn.Conv2d(64, 32, 3, padding=1, bias=False))
    (conv,) = [k for k in kernels(lower(canonical(net, (64, 56, 56)), batch=1, target=TARGET)) if k.is_conv]
    found = Traffic.of([conv, conv])
    assert found.weights == pytest.approx(2 * 4 * 9 * 64 * 32 / 1e6)
    assert found.activations == pytest.approx(2 * (4 * 56 * 56 * (64 + 32) / 1e6 - CACHED))
    assert found.calls == pytest.approx(0.02)


def test_libraries_are_kept_and_a_torn_line_is_dropped(tmp_path):
    first, second, third = libraries(3, (0.02, 0.05, 1.0))
    made = WholeNetworks(tmp_path)
    made.add(first)
    made.add(second)
    assert WholeNetworks(tmp_path).libraries == [first, second]
    with made.path.open("a") as file:
        file.write('{"kernels_ms": 1.0, "who')
    again = WholeNetworks(tmp_path)
    again.add(third)
    assert WholeNetworks(tmp_path).libraries == [first, second, third]
    np.testing.assert_array_equal(WholeNetworks(tmp_path).coefficients, fit([first, second, third]))


def test_damaged_file_is_named(tmp_path):
    made = WholeNetworks(tmp_path)
    made.add(libraries(1, (0, 0, 0))[0])
    made.path.write_text(made.path.read_text().replace("whole_ms", "other"))
    with pytest.raises(UserError, match=r"networks.jsonl is damaged .*delete"):
        WholeNetworks(tmp_path)
