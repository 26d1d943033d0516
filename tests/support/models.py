"""Small torch definitions of the network families that the tool must handle, with non-trivial batch-norm statistics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode with random weights that keep activations near one, and random batch-norms."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            normal(module.weight, (2.0 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                normal(module.bias, 0.1)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            normal(module.weight, 0.2, 1.0)
            normal(module.bias, 0.2)
            normal(module.running_mean, 0.2)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model.eval()


class BasicBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class ResNet18(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        for i, (inside, outside, stride) in enumerate(widths, 1):
            blocks = nn.Sequential(BasicBlock(inside, outside, stride), BasicBlock(outside, outside, 1))
            setattr(self, f"layer{i}", blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))  # before the other branch, as in torchvision's
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """Of so many stages; all four are the usual network."""

    def __init__(self, stages: int = 4, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inside, layers = 64, []
        for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))[:stages]:
            layers.append(
                nn.Sequential(
                    *(Bottleneck(inside if i == 0 else 4 * width, width, stride if i == 0 else 1) for i in range(depth))
                )
            )
            inside = 4 * width
        self.layers = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Vgg16(nn.Module):
    """The thirteen convolutions at full width, plain (with biases), and a small classifier."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Sequential(nn.Linear(512, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def conv_norm(inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inside * expand
        layers = [conv_norm(inside, hidden, 1)] if expand > 1 else []
        layers += [conv_norm(hidden, hidden, 3, stride, hidden)]
        self.conv = nn.Sequential(*layers, nn.Conv2d(hidden, outside, 1, bias=False), nn.BatchNorm2d(outside))
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_norm(3, 32, 3, 2)]
        inside = 32
        for expand, outside, repeats, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for i in range(repeats):
                layers.append(InvertedResidual(inside, outside, stride if i == 0 else 1, expand))
                inside = outside
        self.features = nn.Sequential(*layers, conv_norm(inside, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class Inception(nn.Module):
    """A GoogLeNet block and its pooling branch (ceil mode), local response left out; 5x1 and 1x5 kernels as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 32, 3, 2)
        self.branch1 = conv_norm(32, 16, 1)
        self.branch2 = nn.Sequential(conv_norm(32, 24, 1), conv_norm(24, 32, 3))
        self.branch3 = nn.Sequential(
            nn.Conv2d(32, 8, (5, 1), padding=(2, 0)), nn.Conv2d(8, 16, (1, 5), padding=(0, 2)), nn.BatchNorm2d(16)
        )
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv_norm(32, 16, 1))
        self.pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.reduce = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.fc = nn.Linear(80, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        x = torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)
        x = self.reduce(self.pool(x))
        return {"logits": self.fc(x.mean((2, 3)))}


class DenseLayer(nn.Module):
    """Batch-norm in front of its convolution: it cannot be folded."""

    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu = nn.BatchNorm2d(inside), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inside, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu(self.norm2(y)))], 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block = nn.Sequential(*(DenseLayer(16 + 8 * i, 8) for i in range(3)))
        self.norm = nn.BatchNorm2d(40)
        self.transition = nn.Sequential(nn.Conv2d(40, 20, 1), nn.AvgPool2d(2, 2))
        self.fc = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(F.relu(self.norm(self.block(self.conv0(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class OptionABlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.extra = outside - inside

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """The CIFAR network with parameter-free shortcuts (option A of He et al.)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, inside = [], 16
        for width in (16, 32, 64):
            for i in range(3):
                blocks.append(OptionABlock(inside, width, 2 if width > 16 and i == 0 else 1))
                inside = width
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        x = F.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))


class Irregular(nn.Module):
    """Dilated, grouped and asymmetrically padded convolutions, one module called twice, activations of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.dilated = nn.Conv2d(3, 16, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.twice = nn.Conv2d(32, 32, 3, padding="same", bias=False)
        self.even = nn.Conv2d(32, 16, (2, 4), padding="same")
        self.gate = nn.Conv2d(16, 16, 1)
        self.prelu = nn.PReLU(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.dilated(F.pad(x, (1, 0, 2, 1))), 0.1)
        x = F.hardswish(self.norm(self.grouped(x)))
        x = F.silu(self.twice(x)) + F.gelu(self.twice(x * 0.5))
        x = self.prelu(self.even(x))
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = F.interpolate(x, scale_factor=2, mode="nearest") + F.interpolate(x, scale_factor=2, mode="bilinear")
        n, c, h, w = x.shape
        x = x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = x.chunk(2, 1)
        x = torch.cat([F.elu(left), torch.tanh(right)], 1)
        return F.log_softmax(self.fc(x.amax((2, 3))), -1)


def example() -> nn.Module:
    from tvm_lowrank.example import network

    return network()


# name: (factory, (height, width))
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "resnet18": (ResNet18, (64, 64)),
    "vgg16": (Vgg16, (32, 32)),
    "mobilenetv2": (MobileNetV2, (64, 64)),
    "inception": (Inception, (33, 31)),
    "densenet": (DenseNet, (16, 16)),
    "resnet20": (ResNet20, (32, 32)),
    "irregular": (Irregular, (18, 22)),
    "example": (example, (32, 32)),
}


def site_paths(model: nn.Module) -> list[str]:
    """The module paths of the 2-D convolutions and linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
