"""What a skewed split costs: the same digits, dealt to twenty clients in three ways.

IID: everybody has a bit of everything. Shards: everybody has about two classes (McMahan 2017).
Dirichlet 0.1: as skewed, and the clients are of very unlike size (Hsu 2019). The picture shows who
has what, and what federated averaging makes of it.

    python examples/non_iid.py [non_iid.png]
"""

import functools
import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import fedproc as fp

ROUNDS, CLIENTS = 25, 20
SPLITS = {
    "IID": fp.partition.IID(),
    "2 shards a client": fp.partition.Shards(per_client=2),
    "Dirichlet 0.1": fp.partition.Dirichlet(alpha=0.1),
}

pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
local = fp.LocalTraining(
    nn.CrossEntropyLoss(), functools.partial(torch.optim.SGD, lr=0.2), epochs=5, batch_size=32
)

figure = Figure(figsize=(11, 7), layout="constrained")
grid = figure.add_gridspec(2, 3)
curves = figure.add_subplot(grid[1, :], xlabel="round", ylabel="accuracy on unseen digits")
curves.set_title("what averaging makes of it, 5 of 20 clients a round")
curves.yaxis.set_major_formatter("{x:.0%}")

with fp.Cluster() as cluster:
    print("split              rows a client   labels a client   round 5   round 10    best    last")
    for column, (name, partition) in enumerate(SPLITS.items()):
        data = fp.federate((x, y), cluster, clients=CLIENTS, partition=partition)
        summary = data.summary()
        rows = [client.rows for client in summary]
        kinds = sum(count > 0 for client in summary for count in client.labels.values()) / CLIENTS

        aggregator = fp.Aggregator(model, data, local, clients_per_round=0.25)
        history = aggregator.run(ROUNDS, evaluate_on=(x_test, y_test), progress=False)
        curve = [record.evaluation.accuracy for record in history]
        span = f"{min(rows)} to {max(rows)}"
        shown = f"{name:17s} {span:>14s} {kinds:17.1f}"
        print(f"{shown} {curve[4]:9.1%} {curve[9]:10.1%} {max(curve):7.1%} {curve[-1]:7.1%}")

        summary.draw(axes := figure.add_subplot(grid[0, column], title=f"who has what: {name}"))
        axes.set(yticks=[], ylabel=f"{CLIENTS} clients" if column == 0 else "")
        if column < 2:
            axes.get_legend().remove()
        curves.plot(range(1, ROUNDS + 1), curve, ".-", label=name)

curves.legend()
curves.grid(alpha=0.3)
figure.savefig(path := sys.argv[1] if len(sys.argv) > 1 else "non_iid.png", dpi=110)
print(f"\nThe splits and the curves are in {path}.")
