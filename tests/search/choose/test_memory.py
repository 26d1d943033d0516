"""What a search takes does not grow with the images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = str(Path(__file__).parents[2])
SEARCH = """
import sys
from pathlib import Path

import numpy as np
import psutil
from torch import nn

from support.models import randomised
from tvm_lowrank.bridge.calibrate import predict
from tvm_lowrank.bridge.torch_bridge import TorchBridge
from tvm_lowrank.data.images import part
from tvm_lowrank.importers.importer import import_model
from tvm_lowrank.plan import Choice
from tvm_lowrank.searching.choose.networks import Networks
from tvm_lowrank.searching.choose.sensitivity import Sensitivity
from tvm_lowrank.searching.fit import reconstruct, waiting
from tvm_lowrank.searching.journal import Journal


class Made:
    '''Images that nobody keeps.'''

    def __init__(self, count):
        self.shape = (count, 3, 128, 128)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, picked):
        numbers = np.arange(len(self))[picked]
        made = [np.random.default_rng(number).random(self.shape[1:], np.float32) for number in numbers]
        return np.stack(made)


count, folder = int(sys.argv[1]), Path(sys.argv[2])
layers = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
mod = import_model(randomised(net), input_shape=(1, 3, 128, 128))
images = Made(count)
reconstruct.PASSES = 1
waiting.IN_MEMORY = 2**23  # what is more waits in files
before = psutil.Process().memory_info().rss
known = Sensitivity(mod, images, methods=("channel", "spatial"), lanes=8, share=0.01, folder=folder)
known.probe(Journal(folder / "journal", {}), lambda: None)
networks = Networks(known, part(images, slice(100)), lambda bridge: None)
plan = {"2": Choice("channel", 8), "4": Choice("spatial", 8)}
refitted = networks._refit(mod, plan, known.chain)
reconstructed = reconstruct.reconstruct_if_better(mod, known.network(plan), images, images)
for fitted in (refitted, reconstructed):
    assert np.isfinite(predict(TorchBridge(fitted), images)).all()
status = Path("/proc/self/status").read_text()
print((int(status.split("VmHWM:")[1].split()[0]) * 1024 - before) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_four_times_the_images_take_hardly_more_memory(tmp_path: Path) -> None:
    """600 more images would be 118 MB as float32; statistics, probes, fits and evaluations see all of them."""
    peaks = []
    for count in (200, 800):
        folder = tmp_path / str(count)
        folder.mkdir()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [sys.executable, "-c", SEARCH, str(count), str(folder)],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout.split()[-1]))
    assert peaks[1] < peaks[0] + 40, peaks
