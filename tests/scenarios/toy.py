"""The toy data of the tutorials and small helpers. Light: workers import it."""

import torch
from torch import nn

# Tutorials 2 and 4: the target is the first input. Bob gets rows 0-1, alice rows 2-3.
INPUTS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
TARGETS = torch.tensor([[0.0], [0.0], [1.0], [1.0]])

# The course's first lesson: the target is the second input.
COURSE_INPUTS = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
COURSE_TARGETS = torch.tensor([[1.0], [1.0], [0.0], [0.0]])


def shards(inputs, targets):
    return [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]


def linear(seed):
    return seeded(lambda: nn.Linear(2, 1), seed)


def squared_error(model, x, y):
    return ((model(x) - y) ** 2).sum()


def numbers(model):
    """All parameters as one flat list, to compare bit for bit."""
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def counts(*workers):
    return tuple(len(worker.objects) for worker in workers)


class Branchy(nn.Module):
    """Cannot be traced: the way depends on the data."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else -self.fc(-x)


class Sized(nn.Module):
    """Asks for a size and holds a plain tensor."""

    def __init__(self):
        super().__init__()
        self.scale = torch.tensor([2.0])

    def forward(self, x):
        return x.reshape(x.size(0), -1).sum(dim=1) * self.scale / x.size(0)


class Rnn(nn.Module):
    """The recurrent cell of the tutorial, by hand."""

    def __init__(self, features, hidden, classes):
        super().__init__()
        self.hidden = hidden
        self.i2h = nn.Linear(features + hidden, hidden)
        self.i2o = nn.Linear(features + hidden, classes)

    def forward(self, x, state):
        both = torch.cat((x, state), dim=1)
        return torch.log_softmax(self.i2o(both), dim=1), self.i2h(both)


class Cnn(nn.Module):
    """Two convolutions, two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.conv2 = nn.Conv2d(4, 8, 3)
        self.fc1 = nn.Linear(8 * 4 * 4, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def double_then_abs(x):
    return (x * 2).abs()


def branch(x):
    return x * 10 if x.sum() > 0 else x - 10


def seeded(make, seed=0):
    """A module whose start values depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
