"""A network with its data, as the user's own file: model, data, and labelled batches to train with."""

# small, but slow enough that compressing it is worth it; its own answers are the labels, so it makes no mistake
NETWORK = """
import os
import torch
from torch import nn
from torch.nn import functional as F

def layer(wide, out):
    conv = nn.Conv2d(wide, out, 3, padding=1)
    with torch.no_grad():
        u, _, v = torch.linalg.svd(torch.randn(out, wide * 9), full_matrices=False)
        values = torch.exp(-torch.arange(out) / 16)
        conv.weight.copy_((u * values @ v * (2 * out / values.square().sum()) ** 0.5).view_as(conv.weight))
    return conv

def images(seed, count):
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=16, mode="bicubic")

@torch.no_grad()
def model():
    torch.manual_seed(0)
    convs = (nn.Conv2d(3, 32, 3, padding=1), layer(32, 64), layer(64, 64))
    body = [part for conv in convs for part in (conv, nn.ReLU())]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)).eval()
    net[-1].bias -= net(images(0, 200)).mean(0)
    scale = 4 / net(images(0, 200)).std()
    for values in net[-1].parameters():
        values *= scale
    return net

@torch.no_grad()
def labelled(seed, count):
    x = images(seed, count)
    return x, model()(x).argmax(1)

def data():
    return {"calibration": images(1, 60), "selection": labelled(2, 120), "evaluation": labelled(3, 120)}

def training():
    batches = [labelled(seed, 50) for seed in (4, 5)]

    class Epoch:
        def __init__(self, number):
            self.number = number
        def __len__(self):
            return len(batches)
        def __iter__(self):
            yield from batches
            with open(os.environ["EPOCHS"], "a") as file:
                file.write(f"{self.number}\\n")
    return Epoch
"""
