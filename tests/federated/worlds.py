"""Small data and models that the tests of federated learning share."""

import functools

import torch
from torch import nn

sgd = functools.partial(torch.optim.SGD, lr=0.1)
cross_entropy = nn.CrossEntropyLoss()


def blobs(rows=120, features=6, classes=3, seed=0):
    """Points around one centre per class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (rows,), generator=generator)
    centres = torch.randn(classes, features, generator=generator)
    return centres[y] + 0.5 * torch.randn(rows, features, generator=generator), y


def shards(sizes, **options):
    """Clients "a", "b", … with the given numbers of rows of ``blobs``."""
    x, y = blobs(sum(sizes), **options)
    pieces = zip(x.split(sizes), y.split(sizes), strict=True)
    return dict(zip("abcdefghijklmnopqrstuvwxyz", pieces, strict=False))


def linear(features=6, classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(features, classes)


def dropout_net(features=6, classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(features, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, classes)
    )


def batchnorm_net(features=6, classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes)
    )


def bits(model):
    """Everything of a model that can be compared exactly."""
    return {name: (value.dtype, value.tolist()) for name, value in model.state_dict().items()}
