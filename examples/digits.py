"""Federated averaging on real data: ten clients learn to read handwritten digits together.

scikit-learn's 1,797 digits of 8 x 8 pixels; 20 % of them are held out for the test. The others lie
with ten clients who have the classes in very unequal parts (Dirichlet 0.5). Each client trains on
its own digits in a worker process; only models travel.

    python examples/digits.py [accuracy.png]
"""

import functools
import sys

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import fedproc as fp

ROUNDS = 30


def show(record):
    test = record.evaluation
    print(f"{record.round:5d} {record.loss:15.4f} {test.loss:11.4f} {test.accuracy:15.2%}")


pixels, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(
    torch.tensor(pixels / 16, dtype=torch.float32),
    torch.tensor(labels),
    test_size=0.2,
    random_state=0,
    stratify=labels,
)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
local = fp.LocalTraining(
    loss=nn.CrossEntropyLoss(),
    optimizer=functools.partial(torch.optim.SGD, lr=0.2),
    epochs=3,
    batch_size=16,
)

with fp.Cluster() as cluster:
    data = fp.federate((x, y), cluster, clients=10, partition=fp.partition.Dirichlet(alpha=0.5))

    print(f"{len(data)} digits of {len(data.clients)} clients on {len(cluster)} workers\n")
    print("client       worker      rows   digits 0 1 2 … 9")
    for client in data.clients:
        counts = data[client][1].bincount(minlength=10).tolist()
        shown = " ".join(f"{count:3d}" for count in counts)
        print(f"{client}   {data.worker_of(client).name:10s} {data.sizes[client]:5d}   {shown}")

    aggregator = fp.Aggregator(model, data, local, callbacks=[lambda _, record: show(record)])
    print("\nround   training loss   test loss   test accuracy")
    history = aggregator.run(ROUNDS, evaluate_on=(x_test, y_test), progress=False)

    own = aggregator.evaluate_clients()
    worst = min(own, key=lambda client: own[client].accuracy)
    moved = sum(record.bytes_moved for record in history)

final = history[-1].evaluation.accuracy
print(f"\n{final:.2%} of {len(x_test)} unseen digits are read correctly after {ROUNDS} rounds.")
print(f"The least served client is {worst}: {own[worst].accuracy:.2%} of its own digits.")
print(f"If the clients were remote, {moved / 1e6:.1f} MB of models would have travelled.")

path = sys.argv[1] if len(sys.argv) > 1 else "digits.png"
history.plot(path)
print(f"The curves are in {path}.")
