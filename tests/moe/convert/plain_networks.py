"""Plain networks of other families, written as users write them, and their layers that `convert` should route."""

import torch
from torch import nn
from torch.nn import functional as F


class Normalized(nn.Module):
    """(x - mean) / std, then the network."""

    def __init__(self, network, channels=3):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.linspace(0.4, 0.5, channels))
        self.register_buffer("std", torch.linspace(0.2, 0.3, channels)[:, None, None])

    def forward(self, x):
        return self.network((x - self.mean.view(1, -1, 1, 1)) / self.std)


class LeNet(nn.Module):
    """Convolutions with biases and no norm, two hidden linear layers, dropout, a view."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5, padding="same")
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 4 * 4, 40), nn.Linear(40, 20), nn.Linear(20, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = F.max_pool2d(torch.tanh(self.conv1(x)), 2)
        x = F.max_pool2d(torch.tanh(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc3(self.dropout(F.relu(self.fc2(F.relu(self.fc1(x))))))


def vgg():
    """nn.Sequential with batch norms, convolutions with biases, and a classifier on 2x2 pixels."""
    layers, channels = [], 3
    for width in (8, "M", 16, 16, "M", 24, "M"):
        if width == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    head = [nn.Flatten(), nn.Linear(24 * 2 * 2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5)]
    return nn.Sequential(*layers, *head)


class Squeeze(nn.Module):
    """Squeeze and excitation: two linear layers map the channels' means to factors for the channels."""

    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, channels // 2), nn.Linear(channels // 2, channels)

    def forward(self, x):
        batch, channels, _, _ = x.shape
        weights = self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3))))).sigmoid()
        return x * weights.view(batch, channels, 1, 1)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut, not defined in the order of their calls."""

    def __init__(self, channels, width, outputs, stride):
        super().__init__()
        self.conv3, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width, eps=1e-3)
        self.conv1, self.norm1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.squeeze = Squeeze(outputs)
        same = channels == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(channels, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )  # fmt: skip

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        h = self.squeeze(self.norm3(self.conv3(h)))
        h += self.shortcut(x)
        return F.relu(h, inplace=True)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(24, 5)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.stages = nn.Sequential(Bottleneck(16, 4, 16, 1), Bottleneck(16, 6, 24, 2), Bottleneck(24, 6, 24, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.head(torch.flatten(self.pool(self.stages(self.stem(x))), 1))


class DenseNet(nn.Module):
    """Norms before convolutions, concatenations with all earlier layers, and a transition."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (8, 12, 10, 14))
        self.convs = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1, bias=False) for c in (8, 12, 10, 14))
        self.transition = nn.Conv2d(16, 10, 1, bias=False)
        self.last, self.head = nn.BatchNorm2d(18), nn.Linear(18, 5)

    def forward(self, x):
        h = self.stem(x)
        for number, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            h = torch.cat([h, conv(F.relu(norm(h)))], dim=1)
            if number == 1:
                h = F.avg_pool2d(self.transition(h), 2)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.last(h)), (1, 1)).squeeze(-1).squeeze(-1))


class Fire(nn.Module):
    """SqueezeNet's module: a 1x1 convolution, then a 1x1 and a 3x3 convolution in parallel."""

    def __init__(self, channels, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1, self.expand3 = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.squeeze(x))
        return torch.cat((torch.relu(self.expand1(x)), torch.relu(self.expand3(x))), 1)


def squeezenet():
    """The last convolution gives the class logits."""
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), Fire(16, 8, 12), Fire(24, 8, 16), nn.MaxPool2d(2), Fire(32, 12, 20),
        nn.Dropout2d(0.2), nn.Conv2d(40, 5, 1), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
    )  # fmt: skip
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d):  # without norms, activations vanish under torch's default initialisation
            nn.init.kaiming_uniform_(conv.weight)
            nn.init.normal_(conv.bias, std=0.05)
    return network


class Inception(nn.Module):
    """Branches that start at the images, and a map of one channel that multiplies all channels."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 4, 5, padding=2)
        self.branch3, self.branch5 = nn.Conv2d(10, 8, 3, 2, 1), nn.Conv2d(10, 8, 5, 2, 2)
        self.map, self.head = nn.Conv2d(8, 1, 3, padding=1), nn.Linear(8 + 10, 5)

    def forward(self, x):
        x = F.relu(torch.cat([self.small(x), self.large(x)], 1))
        h = torch.add(input=self.branch3(x), other=self.branch5(x)).div(2)
        h = h.view(x.size(0), -1, h.size(2), h.size(3)) * torch.sigmoid(self.map(h))
        return self.head(torch.cat([h.mean((2, 3)), x.mean([-2, -1])], dim=-1))


class Denoiser(nn.Module):
    """The output of two convolutions is added to the images, which are then classified."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.decode(F.relu(self.encode(x))) + x
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


NETWORKS = {  # name -> maker, and the layers to be routed, in the order of their calls
    "lenet": (LeNet, ["conv2"]),
    "vgg": (lambda: Normalized(vgg()), ["network.4", "network.7", "network.11"]),
    "resnet": (lambda: Normalized(ResNet()), [f"network.stages.{i}.conv2" for i in range(3)]),
    "densenet": (DenseNet, [f"convs.{i}" for i in range(4)]),
    "squeezenet": (squeezenet, [f"{i}.expand3" for i in (2, 3, 5)]),
    "inception": (Inception, ["branch3", "branch5"]),
    "denoiser": (Denoiser, ["conv1", "conv2"]),
}


def make_network(name):
    """A network with random norms and biases, in float64 and eval mode."""
    torch.manual_seed(0)
    model = NETWORKS[name][0]().double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def images(batch=6):
    return torch.rand(batch, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
