"""What an update gives away: the digits it was learned from, drawn by the one who averages.

The parent knows the model before and after a round, the learning rate, and how long clients train.
With one client in a round the difference is that client's update; under secure aggregation it is
the mean of all of them, and nothing else arrives. Two attacks use that and nothing else:

- Linear layer: the gradient of output k is d[k] x for its weights and d[k] for its bias, so their
  ratio is the input x (Phong et al. 2017; Geiping et al. 2020, "Inverting Gradients").
- CNN: find digits and labels that, trained on, change the model in the same way (Zhu et al. 2019,
  "Deep Leakage from Gradients"; through several local steps: Geiping et al. 2020).

The error is the mean squared error over the variance of the digit's pixels: 0 is a perfect copy.
Every digit of a round is compared with the reconstruction closest to it.

    python examples/reconstruct.py [reconstruct.png]
"""

import functools
import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

import fedproc as fp

RATE = 0.1
SECURE, WEAK, STRONG = (
    {"secure": fp.SecureAggregation()},
    {"privacy": fp.DifferentialPrivacy(clip_norm=0.5, noise_multiplier=0.01, delta=1e-5)},
    {"privacy": fp.DifferentialPrivacy(clip_norm=0.5, noise_multiplier=1.0, delta=1e-5)},
)
SETTINGS = {  # clients, digits of each, epochs (one full batch each), protection
    "1 digit, 1 step": (1, 1, 1, {}),
    "8 digits, 5 epochs": (1, 8, 5, {}),
    "secure sum of 10:\n1 digit, 1 step": (10, 1, 1, SECURE),
    "secure sum of 10:\n8 digits, 5 epochs": (10, 8, 5, SECURE),
    "DP noise 0.01:\n1 digit, 1 step": (1, 1, 1, WEAK),
    "DP noise 1:\n1 digit, 1 step": (1, 1, 1, STRONG),
}


def play(net, clients, digits, epochs, protection):
    """What the parent gets from one round: the change of the model. And the round's record."""
    shares = list(zip(x.split(digits), y.split(digits), strict=True))[:clients]
    data = fp.FederatedDataset({f"client-{n}": share for n, share in enumerate(shares)}, cluster)
    sgd = functools.partial(torch.optim.SGD, lr=RATE)
    local = fp.LocalTraining(nn.CrossEntropyLoss(), sgd, epochs=epochs, batch_size=None)
    aggregator = fp.Aggregator(net, data, local, weighting="uniform", **protection)
    record = aggregator.run_round()
    pairs = zip(aggregator.model.parameters(), net.parameters(), strict=True)
    return [(after - before).detach().double() for after, before in pairs], record


def divide(update):
    """The input of the linear layer: weights by bias, least squares over the ten outputs."""
    weights, bias = update
    return (bias @ weights / (bias @ bias)).clamp(0, 1).view(1, 1, 8, 8)


def match(net, update, clients, digits, steps):
    """Digits of all clients that change ``net`` by ``update`` if each client trains on its own."""
    start = {name: p.detach().double().requires_grad_() for name, p in net.named_parameters()}
    rows, draw = clients * digits, torch.Generator().manual_seed(0)
    guess = torch.rand(rows, 1, 8, 8, generator=draw, dtype=torch.float64).requires_grad_()
    label = torch.zeros(rows, 10, dtype=torch.float64).requires_grad_()
    options = {"tolerance_grad": 0, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    search = torch.optim.LBFGS([guess, label], max_iter=100, history_size=50, **options)

    def trained(images, scores):
        now = start
        for _ in range(steps):
            loss = nn.functional.cross_entropy(functional_call(net, now, images), scores.softmax(1))
            slopes = torch.autograd.grad(loss, tuple(now.values()), create_graph=True)
            now = {name: p - RATE * g for (name, p), g in zip(now.items(), slopes, strict=True)}
        return now.values()

    def distance():
        parts = zip(guess.split(digits), label.split(digits), strict=True)
        ends = zip(*(trained(*part) for part in parts), strict=True)
        goals = [p + u for p, u in zip(start.values(), update, strict=True)]
        means = (sum(end) / clients for end in ends)
        gap = sum((mean - goal).square().sum() for mean, goal in zip(means, goals, strict=True))
        gap = gap / sum(u.square().sum() for u in update)
        guess.grad, label.grad = torch.autograd.grad(gap, (guess, label))
        return gap

    search.step(distance)
    return guess.detach().clamp(0, 1)


def errors(found, true):
    """For each true digit the smallest error of a reconstruction, and which one has it."""
    squares = (found[:, None] - true).square().mean((2, 3, 4))
    return (squares / true.var((1, 2, 3), correction=0)).min(0)


torch.set_num_threads(1)  # small tensors: more threads would wait for each other
pixels, labels = load_digits(return_X_y=True)
mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
x, y = torch.tensor(pixels / 16).float().view(-1, 1, 8, 8)[mixed], torch.tensor(labels)[mixed]
torch.manual_seed(0)
linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
cnn = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(256, 10))
grid = (figure := Figure(figsize=(12, 7), layout="constrained")).subplots(3, len(SETTINGS))
mean = f"{errors(x.mean(0)[None], x)[0].mean():.2f}"
figure.suptitle(f"A digit, and what was found of it. Error: 0 is a copy, the mean digit has {mean}")
for axes, kind in zip(
    grid[:, 0], ("the digit", "from the linear layer", "from the CNN"), strict=True
):
    axes.set_ylabel(kind)
print(
    f"Mean error of the digits of a round; the mean of all digits, without an attack, has {mean}."
)
print("Epsilon is that of differential privacy, where there is any.\n")
print(f"{'one round':40s} {'linear':>9s} {'CNN':>9s} {'epsilon':>9s}")
with fp.Cluster() as cluster:
    for column, (name, (clients, digits, epochs, protection)) in zip(
        grid.T, SETTINGS.items(), strict=True
    ):
        true = x[: clients * digits]
        divided = divide(play(linear, clients, digits, epochs, protection)[0])
        change, record = play(cnn, clients, digits, epochs, protection)
        images, scores = [(name, true[0])], []
        for found in (divided, match(cnn, change, clients, digits, epochs)):
            error, closest = errors(found, true)
            scores.append(f"{error.mean():9.2g}")
            images.append((f"error of this digit: {error[0]:.2g}", found[closest[0]]))
        cost = "-" if record.epsilon is None else f"{record.epsilon:.1f}"
        print(f"{name.replace(chr(10), ' '):40s} {' '.join(scores)} {cost:>9s}", flush=True)
        for axes, (title, image) in zip(column, images, strict=True):
            axes.imshow(image[0], cmap="gray_r", vmin=0, vmax=1)
            axes.set_title(title, fontsize=9)
            axes.set(xticks=[], yticks=[])

figure.savefig(path := sys.argv[1] if len(sys.argv) > 1 else "reconstruct.png", dpi=120)
print(f"\nOne digit of each round, what was found of it, and its own error are in {path}.")
