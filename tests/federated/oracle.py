# ruff: noqa: NPY002 - the global stream is the subject
"""The plain sequential loop that federated averaging must equal, bit for bit.

No cluster, no pointers, no flat blocks: only PyTorch. Run it with one torch thread.
"""

import copy
import random

import numpy as np
import torch

from fedproc.client.seeding import derive_seed


def sequential_fedavg(
    model, shards, loss, optimizer, *, rounds, seed=0, uniform=False, cohort=None, **epochs
):
    """Trains on ``shards`` (client -> (x, y)) one after the other; returns the last model.

    Each client has a copy of the model and of the loss as it was given. ``cohort``: number of a
    round -> the clients that train in it; None: all of them.
    """
    model = copy.deepcopy(model)
    travels = {name for name, _ in named_tensors(model)}
    for number in range(1, rounds + 1):
        total, weights = {}, 0.0
        for client in cohort(number) if cohort else shards:
            x, y = shards[client]
            local = copy.deepcopy(model).train()
            key = seed, number, client
            train_client(local, x, y, copy.deepcopy(loss), optimizer, key, **epochs)
            weight = 1.0 if uniform else float(len(x))
            weights += weight
            for name, value in [*local.named_parameters(), *local.named_buffers()]:
                if name in travels:
                    add(total, name, value.detach(), weight)
        for name, value in named_tensors(model):
            mean = total[name] / weights if value.is_floating_point() else total[name]
            value.copy_(mean)
    return model


@torch.no_grad()
def add(total, name, value, weight):
    if value.is_floating_point():
        total[name] = total.get(name, 0.0) + value.double() * weight
    else:
        total[name] = torch.maximum(total.get(name, value), value)


def named_tensors(model):
    trained = [(name, p.data) for name, p in model.named_parameters() if p.requires_grad]
    return [*trained, *model.named_buffers()]


def train_client(model, x, y, loss, optimizer, key, epochs=1, batch_size=32, shuffle=True):
    seed = derive_seed(*key, "streams")
    random.seed(seed), np.random.seed(seed % 2**32), torch.manual_seed(seed)
    order = torch.Generator().manual_seed(derive_seed(*key, "shuffle"))
    steps = optimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(epochs):
        rows = torch.randperm(len(x), generator=order) if shuffle else torch.arange(len(x))
        for batch in rows.split(batch_size or len(x)):
            steps.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            steps.step()
