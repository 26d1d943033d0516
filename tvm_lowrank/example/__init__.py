"""The bundled example: a VGG-style CIFAR-10 network, its trained weights and 4,000 real images.

`tvm_lowrank search` uses it when neither ``--model`` nor ``--data`` is given. The weights come from
``examples/cifar10/train.py``; the images are CIFAR-10 (Krizhevsky 2009): 1,000 training images for
calibration, 1,000 images held out of training for selection, the first 2,000 test images for evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn

HERE = Path(__file__).parent
NAME = "example"  # what reports call the network and the images
INPUT_SHAPE = (1, 3, 32, 32)
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# (output channels, size of the max-pool that follows, 1 for none) of the eight 3x3 convolutions
LAYERS = ((64, 1), (64, 2), (128, 1), (128, 2), (256, 1), (256, 2), (256, 1), (256, 4))


def network() -> nn.Module:
    """The untrained network: eight 3x3 convolutions with batch-norm and ReLU, 2.3 M parameters, 171 M MACs."""
    from collections import OrderedDict

    from torch import nn

    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for i, (width, pool) in enumerate(LAYERS, 1):
        layers[f"conv{i}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers[f"norm{i}"] = nn.BatchNorm2d(width)
        layers[f"relu{i}"] = nn.ReLU()
        if pool > 1:
            layers[f"pool{i}"] = nn.MaxPool2d(pool)
        channels = width
    layers["flatten"] = nn.Flatten()
    layers["classifier"] = nn.Linear(channels, len(CLASSES))
    return nn.Sequential(layers)


def model() -> nn.Module:
    """The trained network, in evaluation mode (input: float32 NCHW, normalised with ``MEAN`` and ``STD``)."""
    import torch

    net = network()
    with np.load(HERE / "weights.npz", allow_pickle=False) as stored:
        state = {name: torch.from_numpy(array.astype("float32", copy=True)) for name, array in stored.items()}
    net.load_state_dict(state, strict=False)
    return net.eval()


def normalise(images: np.ndarray) -> np.ndarray:
    """uint8 NHWC pixels to the float32 NCHW tensor that the network was trained on."""
    scaled = (images.astype("float32") / 255 - np.asarray(MEAN, "float32")) / np.asarray(STD, "float32")
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def data() -> dict[str, Any]:
    """The three splits as `--data` expects them: ``calibration``, and (images, labels) pairs for the others."""
    with np.load(HERE / "images.npz", allow_pickle=False) as stored:
        split = dict(stored)
    return {
        "calibration": normalise(split["calibration_x"]),
        "selection": (normalise(split["selection_x"]), split["selection_y"].astype("int64")),
        "evaluation": (normalise(split["evaluation_x"]), split["evaluation_y"].astype("int64")),
    }
