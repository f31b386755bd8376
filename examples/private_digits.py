"""Accuracy against epsilon: what it costs that the model tells little about any one client.

400 people hold three or four handwritten digits each. Every round about 100 of them take part; each
one's change of the model is clipped to a norm, and noise is added to the sum. More noise: a smaller
epsilon, so less about anybody can be learned from the model, and a worse model.

    python examples/private_digits.py [private_digits.png]
"""

import functools
import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import fedproc as fp

CLIENTS, DELTA, ROUNDS = 400, 1e-4, 30
NOISE = {0.6: "C0", 2.0: "C1", 8.0: "C2"}

pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
torch.manual_seed(0)
model = nn.Linear(64, 10)
local = fp.LocalTraining(nn.CrossEntropyLoss(), functools.partial(torch.optim.SGD, lr=1.0))


def train(data, privacy):
    aggregator = fp.Aggregator(
        model,
        data,
        local,
        clients_per_round=0.25,  # each client by itself, with this probability
        weighting="uniform",
        privacy=privacy,
    )
    return aggregator.run(ROUNDS, evaluate_on=(x_test, y_test), progress=False)


axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
axes.set(xlabel=f"epsilon at delta = {DELTA:g}", ylabel="accuracy on unseen digits", xscale="log")
axes.set_title(f"{ROUNDS} rounds, a dot each: less noise costs a larger epsilon")
axes.yaxis.set_major_formatter("{x:.0%}")
with fp.Cluster() as cluster:
    data = fp.federate((x, y), cluster, clients=CLIENTS)
    free = train(data, None)[-1].evaluation.accuracy
    axes.axhline(free, color="grey", linestyle="--", label="not private")
    print(f"not private: {free:.1%} after {ROUNDS} rounds\n")
    print("noise multiplier   epsilon after 10, 20, 30 rounds   accuracy then")
    for noise, colour in NOISE.items():
        history = train(data, fp.DifferentialPrivacy(1.0, noise, DELTA))
        spent = [record.epsilon for record in history]
        accuracy = [record.evaluation.accuracy for record in history]
        axes.plot(spent, accuracy, colour, marker=".", label=f"noise {noise:g}")
        costs = ", ".join(f"{spent[n - 1]:6.2f}" for n in (10, 20, 30))
        reached = ", ".join(f"{accuracy[n - 1]:.1%}" for n in (10, 20, 30))
        print(f"{noise:16g}   {costs:>31s}   {reached}")

axes.xaxis.set_major_formatter("{x:g}")
figure.legend(loc="outside lower center", ncols=4)
axes.grid(alpha=0.3)
figure.savefig(path := sys.argv[1] if len(sys.argv) > 1 else "private_digits.png", dpi=120)
print(f"\nEach dot is a round; the curves are in {path}.")
