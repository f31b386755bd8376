"""Differential privacy by examples, inside a client: DP-SGD with Opacus as a train function.

fp.DifferentialPrivacy protects whole clients from those who see the model. Here each client, say
a hospital, protects its own patients from everybody, the aggregator included: every gradient of a
patient is clipped and noise is added before anything leaves. Each client has its own epsilon.

    pip install "fedproc[opacus]"
    python examples/opacus_client.py
"""

import sys
import warnings

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import fedproc as fp

try:
    import opacus
except ImportError:
    print("skipped: Opacus is not installed; pip install 'fedproc[opacus]'")
    sys.exit(0)

ROUNDS, DELTA, NOISE, RATE = 5, 1e-3, 1.0, 0.1


def train(model, x, y, ctx):
    """One epoch of DP-SGD; the accountant stays with the client from round to round."""
    warnings.filterwarnings("ignore", "Full backward hook")  # how Opacus sees single gradients
    private = opacus.GradSampleModule(model)
    try:
        optimizer = opacus.optimizers.DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.5),
            noise_multiplier=NOISE,
            max_grad_norm=1.0,
            expected_batch_size=RATE * len(x),
            generator=None,  # drawn from the seed of the run: take a secret one where it matters
        )
        accountant = opacus.accountants.RDPAccountant()
        accountant.history = [tuple(entry) for entry in ctx.state.get("history", [])]
        for _ in range(round(1 / RATE)):
            drawn = torch.rand(len(x), generator=ctx.generator) < RATE  # Poisson, by examples
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(x[drawn]), y[drawn]).backward()
            optimizer.step()
            accountant.step(noise_multiplier=NOISE, sample_rate=RATE)
    finally:
        private.to_standard_module()  # takes Opacus' hooks off the model again
    ctx.state["history"] = [list(entry) for entry in accountant.history]
    return {"epsilon": accountant.get_epsilon(DELTA)}


pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
torch.manual_seed(0)

with fp.Cluster() as cluster:
    hospitals = fp.federate((x, y), cluster, clients=5)
    aggregator = fp.Aggregator(nn.Linear(64, 10), hospitals, train)
    print("round   epsilon of each client   accuracy on unseen digits")
    for _ in range(ROUNDS):
        record = aggregator.run_round()
        accuracy = aggregator.evaluate((x_test, y_test), nn.CrossEntropyLoss()).accuracy
        print(f"{record.round:5d} {record.metrics['epsilon']:24.2f} {accuracy:27.1%}")

print(
    f"\nThe aggregator can tell little of any one row: epsilon {record.metrics['epsilon']:.2f} at"
)
print(f"delta {DELTA:g} is what each client has spent, whatever becomes of its updates.")
