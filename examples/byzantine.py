"""Three of ten clients attack: they send the opposite of what they learned, twenty times as large.

The mean follows them wherever they want. Median, trimmed mean, Krum and the geometric median look
at all updates at once, and hardly notice.

    python examples/byzantine.py [byzantine.png]
"""

import functools
import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import fedproc as fp

ROUNDS = 6
ATTACKERS = {"client-001", "client-004", "client-008"}
RULES = {
    "FedAvg": fp.FedAvg(),
    "Median": fp.Median(),
    "TrimmedMean(0.3)": fp.TrimmedMean(0.3),
    "Krum(3, keep=5)": fp.Krum(byzantine=3, keep=5),
    "GeometricMedian": fp.GeometricMedian(),
}


def train(attackers, model, x, y, ctx):
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    if ctx.client in attackers:
        with torch.no_grad():
            for p, before in zip(model.parameters(), start, strict=True):
                p.copy_(before - 20 * (p - before))


pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
torch.manual_seed(0)
model = nn.Linear(64, 10)
whole, near = (figure := Figure(figsize=(10, 4), layout="constrained")).subplots(1, 2)
whole.set(ylabel="accuracy on unseen digits", title="3 of 10 clients attack", ylim=(-0.05, 1))
near.set(title="the same, from 85 to 95 %", ylim=(0.85, 0.95))  # the robust rules, side by side

with fp.Cluster() as cluster:
    data = fp.federate((x, y), cluster, clients=10)
    print("rule               all honest   3 of 10 attack")
    for name, rule in RULES.items():
        final = []
        for attackers in (set(), ATTACKERS):
            local = functools.partial(train, attackers)
            aggregator = fp.Aggregator(model, data, local, strategy=rule)
            history = aggregator.run(ROUNDS, evaluate_on=(x_test, y_test), progress=False)
            curve = [record.evaluation.accuracy for record in history]
            final.append(curve[-1])
        for axes in (whole, near):
            axes.plot(range(1, ROUNDS + 1), curve, ".-", label=name)
        print(f"{name:16s} {final[0]:12.1%} {final[1]:16.1%}")

for axes in (whole, near):
    axes.set(xlabel="round", xticks=range(1, ROUNDS + 1))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=len(RULES))
figure.savefig(path := sys.argv[1] if len(sys.argv) > 1 else "byzantine.png", dpi=120)
print(f"\nThe curves under attack are in {path}.")
