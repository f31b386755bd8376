"""Ditto (Li et al. 2021): everybody trains one global model and keeps a personal one beside it.

Eight clients write digits, and half of them label theirs in another way: 0 is 9, 1 is 8, … No
single model can be right for both. A personal model v descends on its own rows and is pulled
towards the global model w: gradient of F(v) + lam/2 |v - w|^2. It stays with its client, in
ctx.state. A fifth of each client's digits is held out to measure both models.

    python examples/personalised.py [personalised.png]
"""

import copy
import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import fedproc as fp

ROUNDS, LAM, LR = 15, 0.1, 0.3


def ditto(model, x, y, ctx):
    held = torch.arange(len(x)) % 5 == 0
    personal = copy.deepcopy(model)
    personal.load_state_dict(ctx.state.get("v", model.state_dict()))
    start, found = [p.detach().clone() for p in model.parameters()], {}
    for kind, net, pull in (("global", model, 0.0), ("own", personal, LAM)):
        right = (net(x[held]).argmax(1) == y[held]).float().mean()
        found |= {kind: right, f"{kind} of {ctx.client}": right}
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        for rows in torch.where(~held)[0].repeat(4).split(32):
            optimizer.zero_grad()
            pairs = zip(net.parameters(), start, strict=True)
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            (loss + pull / 2 * sum((p - w).square().sum() for p, w in pairs)).backward()
            optimizer.step()
    ctx.state["v"] = personal.state_dict()
    return found


x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
clients = {f"writer-{n}": (x[n::8].float() / 16, abs(9 * (n // 4) - y[n::8])) for n in range(8)}
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
with fp.Cluster() as cluster:
    aggregator = fp.Aggregator(model, fp.FederatedDataset(clients, cluster), ditto)
    history = aggregator.run(ROUNDS, progress=False)

print(f"Accuracy on held-out digits after {ROUNDS} rounds:\n")
print("client     labels   global model   own model")
for n, name in enumerate(clients):
    both = [history[-1].metrics[f"{kind} of {name}"] for kind in ("global", "own")]
    print(f"{name}   {'turned' if n >= 4 else 'usual '} {both[0]:14.1%} {both[1]:11.1%}")
axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot()
axes.set(title="4 of 8 clients label the digits the other way round", ylim=(0, 1))
axes.set(xlabel="round", ylabel="mean accuracy on held-out digits")
axes.yaxis.set_major_formatter("{x:.0%}")
for kind, label in (("global", "global model"), ("own", "own model (Ditto)")):
    curve = [record.metrics[kind] for record in history]
    axes.plot(range(1, ROUNDS + 1), curve, ".-", label=label)
axes.legend()
axes.grid(alpha=0.3)
figure.savefig(path := sys.argv[1] if len(sys.argv) > 1 else "personalised.png", dpi=120)
print(f"\nThe mean of all clients, round by round, is in {path}.")
