"""Two data owners and one model: first it visits them in turn, then a third worker averages.

Four rows of data: bob holds two, alice the other two, and the truth is the first column. Each sees
only one kind of answer, so neither can learn the rule alone.

    python examples/bob_and_alice.py [bob_and_alice.png]
"""

import sys

import torch
from matplotlib.figure import Figure
from torch import nn

import fedproc as fp

ROUNDS, VISIT_STEPS, LOCAL_STEPS = 10, 2, 10

inputs = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
targets = torch.tensor([[0.0], [0.0], [1.0], [1.0]])


def loss_of(model, x, y):
    return ((model(x) - y) ** 2).sum()


def train(model, x, y, steps):
    """SGD where the model and the rows are: the optimizer lives there too. Waits for nothing."""
    optimizer = model.worker.run(torch.optim.SGD, model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    return model


def tell_loss(number, model):
    print(f"  round {number:2d}: loss {loss_of(model, inputs, targets):.4f}")
    return loss_of(model, inputs, targets).item()


def tell_end(model, cluster):
    for row, truth, guess in zip(inputs, targets, model(inputs), strict=True):
        print(f"  {row.tolist()} -> {guess.item():5.2f}   (truth {truth.item():.0f})")
    for worker in cluster:
        held = [f"{info.type} {info.shape}" for info in worker.objects.values()]
        print(f"  {worker.name} holds {', '.join(held) or 'nothing'}")


torch.manual_seed(0)
start, rounds = nn.Linear(2, 1), range(1, ROUNDS + 1)

with fp.Cluster(["bob", "alice", "sec"]) as cluster:
    bob, alice, sec = cluster
    shards = [
        (bob.send(inputs[:2]), bob.send(targets[:2])),
        (alice.send(inputs[2:]), alice.send(targets[2:])),
    ]

    print(f"1. The model goes to bob, trains {VISIT_STEPS} steps, comes home, goes to alice, ...")
    model, turns = start, []
    for number in rounds:
        for x, y in shards:
            model = train(x.worker.send(model), x, y, VISIT_STEPS).get()
        turns.append(tell_loss(number, model))
    tell_end(model, cluster)

    print(f"\n2. A copy each trains at bob and alice at once, {LOCAL_STEPS} steps; sec averages.")
    model, averaged = start, []
    for number in rounds:
        trained = [train(x.worker.send(model), x, y, LOCAL_STEPS) for x, y in shards]
        met = [copy.move(sec) for copy in trained]  # from worker to worker, not through here
        model = fp.weighted_average(met).get()  # only the mean comes home
        averaged.append(tell_loss(number, model))
    del trained, met  # the two models of the last round were still at sec
    tell_end(model, cluster)

print(
    "\nNo model that one owner alone trained came here in part 2; sec saw all of them. That rests"
)
print("on trust in sec, not on cryptography: nothing stops sec, or this process, from looking.")

axes = Figure(figsize=(6.0, 3.5), layout="constrained").add_subplot(yscale="log")
axes.plot(rounds, turns, "o-", label=f"in turns, {VISIT_STEPS} steps a visit")
axes.plot(rounds, averaged, "s-", label=f"averaged by sec, {LOCAL_STEPS} steps each")
axes.set(xlabel="round", ylabel="loss on all four rows", title="two owners, one model")
axes.set_xticks(rounds)
axes.grid(alpha=0.3)
axes.legend()
path = sys.argv[1] if len(sys.argv) > 1 else "bob_and_alice.png"
axes.figure.savefig(path, dpi=120)
print(f"The losses are drawn in {path}.")
