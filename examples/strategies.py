"""Four strategies on the same skewed split: how many rounds until 90 % of unseen digits are right?

Ten clients hold scikit-learn's digits, each mostly one or two of the ten classes (Dirichlet 0.1),
and train long before they talk: their models drift apart, and the mean of them suffers. Scaffold
corrects their direction, FedAdam takes smoother steps on the server, FedProx holds the clients
back, which helps least here. Everything else is equal: model, split, seed, local training.

    python examples/strategies.py [strategies.png]
"""

import functools
import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import fedproc as fp

ROUNDS, GOAL = 22, 0.9
STRATEGIES = {
    "FedAvg": fp.FedAvg(),
    "FedAdam": fp.FedAdam(lr=0.05),
    "Scaffold": fp.Scaffold(),
    "FedProx": fp.FedProx(mu=0.05),
}

pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
test = torch.arange(len(x)) % 5 == 0
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
local = fp.LocalTraining(
    nn.CrossEntropyLoss(), functools.partial(torch.optim.SGD, lr=0.3), epochs=5, batch_size=64
)

axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
axes.set(xlabel="round", ylabel="accuracy on unseen digits")
axes.set_title("ten clients with few kinds of digits each")
axes.yaxis.set_major_formatter("{x:.0%}")
axes.axhline(GOAL, color="gray", linestyle=":", label=f"{GOAL:.0%}")

with fp.Cluster() as cluster:
    data = fp.federate(
        (x[~test], y[~test]), cluster, clients=10, partition=fp.partition.Dirichlet(0.1)
    )
    print(f"{data.summary()}\n")
    print("strategy   rounds to 90 %   best accuracy   after the last round   seconds")
    for name, strategy in STRATEGIES.items():
        aggregator = fp.Aggregator(model, data, local, strategy=strategy, clients_per_round=0.5)
        history = aggregator.run(ROUNDS, evaluate_on=(x[test], y[test]), progress=False)
        curve = [record.evaluation.accuracy for record in history]
        reached = next((str(n) for n, found in enumerate(curve, 1) if found >= GOAL), "not reached")
        seconds = sum(record.seconds for record in history)
        print(f"{name:8s} {reached:>16s} {max(curve):15.1%} {curve[-1]:22.1%} {seconds:9.1f}")
        axes.plot(range(1, ROUNDS + 1), curve, ".-", label=name)

axes.legend()
axes.grid(alpha=0.3)
figure.savefig(path := sys.argv[1] if len(sys.argv) > 1 else "strategies.png", dpi=120)
print(f"\nThe curves are in {path}.")
