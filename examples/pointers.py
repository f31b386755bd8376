"""Pointers step by step. Each comment `# -> ` is what the line above prints.

python examples/pointers.py
"""

import re
import textwrap

import torch

import fedproc as fp


def holds(*workers):
    """How many objects live in each worker now."""
    return {worker.name: len(worker.objects) for worker in workers}


def tell(error):
    """An error as a user reads it, wrapped; ids differ from run to run, so they are left out."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    print(textwrap.fill(re.sub(r"(object|Pointer) \d+", r"\1", text), width=90))


# ---- Workers: each is an operating-system process of its own.

cluster = fp.Cluster(["bob", "alice"])
bob, alice = cluster

print([worker.name for worker in cluster], bob.alive, bob.pid != alice.pid)
# -> ['bob', 'alice'] True True

# ---- send: bob gets a copy, we keep a pointer. The local tensor is left alone.

x = torch.tensor([1.0, 2.0, 3.0])
p = bob.send(x)
x[0] = 100  # our own copy: bob's does not change
print(holds(bob, alice))
# -> {'bob': 1, 'alice': 0}

# ---- What a pointer knows: where, and what is there. It never shows values.

print(p.worker.name, p.shape, p.dtype, len(p), p.requires_grad)
# -> bob torch.Size([3]) torch.float32 3 False

# ---- Operators, methods, torch functions: they run at bob and give pointers. Nothing waits.

q = bob.run(torch.ones, 3)  # made there, never here
print((p + q).get())
# -> tensor([2., 3., 4.])
print(torch.stack([p, q]).sum(dim=0).get())
# -> tensor([2., 3., 4.])
print(((p * 2 - 1) @ q).item())  # item, float, tolist fetch a plain answer
# -> 9.0
p[0] = 7
p.add_(1)  # in place, there
print(p.tolist())
# -> [8.0, 3.0, 4.0]
values, places = p.sort()  # several results: several pointers
print(values.tolist(), places.tolist())
# -> [3.0, 4.0, 8.0] [1, 2, 0]
del values, places

# ---- Look inside the worker.

for info in bob.objects.values():
    print(info.type, info.shape, info.dtype, info.nbytes)
# -> torch.Tensor (3,) torch.float32 12
# -> torch.Tensor (3,) torch.float32 12
del q  # nobody points to it any more: bob forgets it
print(holds(bob))
# -> {'bob': 1}

# ---- get brings a value home and takes it from bob; fetch leaves it there.

print(p.fetch(), holds(bob))
# -> tensor([8., 3., 4.]) {'bob': 1}
print(p.get(), holds(bob))
# -> tensor([8., 3., 4.]) {'bob': 0}

# ---- Chains: a pointer can be sent, too. Now alice holds a pointer to bob's object.

p = bob.send(torch.tensor([1.0, 2.0]))
chain = p.send(alice)
print(chain.worker.name, holds(bob, alice))
# -> alice {'bob': 1, 'alice': 1}
total = chain + chain  # computed where the data is
print(total.worker.name, total.get())
# -> bob tensor([2., 4.])
p = chain.get()  # one step home: the pointer to bob
print(p.worker.name, p.fetch(), holds(bob, alice))
# -> bob tensor([1., 2.]) {'bob': 1, 'alice': 0}

# ---- remote_get: alice pulls the data over. It does not pass through this process.

chain = p.send(alice)
chain.remote_get()
print(chain.worker.name, chain.fetch(), holds(bob, alice))
# -> alice tensor([1., 2.]) {'bob': 0, 'alice': 1}
del p, chain

# ---- move: from worker to worker in one step; the pointer follows.

p = bob.send(torch.tensor([1.0, 2.0]))
p.move(alice)
print(p.worker.name, holds(bob, alice))
# -> alice {'bob': 0, 'alice': 1}
print((p * 10).get())
# -> tensor([10., 20.])

# ---- Groups: one pointer on each worker, one operation for all, at the same time.

group = cluster.send(torch.tensor([3.0, 4.0]))
print((group**2).sum().get())
# -> [tensor(25.), tensor(25.)]
pair = fp.group(bob.send(torch.tensor([1.0, 1.0])), p)
print((pair + group).get())
# -> [tensor([4., 5.]), tensor([4., 6.])]
print(fp.gather([bob.run(sum, [1, 2]), alice.run(sum, [3, 4])]))  # waits for all of them at once
# -> [3, 7]
del group, pair, p

# ---- Tags: label what you send, find it later, on one worker or on all.

ages = bob.send(torch.tensor([31, 45]), tags=("#people", "#ages"), description="in years")
sizes = bob.send(torch.tensor([1.7, 1.8]), tags=("#people", "#sizes"))
others = alice.send(torch.tensor([28]), tags=("#people", "#ages"))
print(len(bob.search("#people")), [p.tolist() for p in bob.search("#people", "#ages")])
# -> 2 [[31, 45]]
for name, pointers in cluster.search("#ages").items():
    print(name, [(p.tolist(), p.description) for p in pointers])
# -> bob [([31, 45], 'in years')]
# -> alice [([28], '')]
bob.clear()
alice.clear()

# ---- Gradients: backward runs there, and a leaf brings its gradient home.

w = bob.send(torch.tensor([1.0, 2.0, 3.0], requires_grad=True))
loss = (w**2).sum()
loss.backward()
print(loss.item(), w.grad.fetch())
# -> 14.0 tensor([2., 4., 6.])
with torch.no_grad():  # holds for commands issued in the block
    w -= 0.5 * w.grad
home = w.get()
print(home, home.grad)
# -> tensor([0., 0., 0.], requires_grad=True) tensor([2., 4., 6.])

# ---- run: any function, lambdas too; pointers among the arguments are bob's own objects there.

table = bob.send({"x": torch.arange(4.0), "name": "table"})
print(bob.run(lambda t, power: (t["x"] ** power).mean(), table, 2).get())
# -> tensor(3.5000)
print(table["name"].get(), len(table))
# -> table 2

# ---- borrow: look at bob's memory without a copy, for the length of a block.

p = bob.send(torch.arange(1_000_000, dtype=torch.float32))
with p.borrow() as seen:
    print(seen[-3:], seen.max().item())
# -> tensor([999997., 999998., 999999.]) 999999.0

# ---- Errors say what is where and what to do.

q = alice.send(torch.ones(3))
try:
    bob.send(torch.ones(3)) + q
except fp.PlacementError as error:  # two places: nothing is moved silently
    tell(error)
# -> PlacementError: +: <TensorPointer on alice (3,) float32> is on worker 'alice', but
# -> <TensorPointer on bob (3,) float32> is on worker 'bob'. Nothing was moved. Move it first:
# -> pointer.move(cluster['bob']).

try:
    q + torch.ones(3)
except fp.PlacementError as error:  # a local tensor is another place
    tell(error)
# -> PlacementError: +: <TensorPointer on alice (3,) float32> is on worker 'alice', but a local
# -> tensor of shape (3,) is in this process. Nothing was moved. Send it first:
# -> cluster['alice'].send(tensor); or bring the other home: pointer.get().

print(q.get())
# -> tensor([1., 1., 1.])
try:
    q.get()
except fp.ObjectGoneError as error:
    tell(error)
# -> ObjectGoneError: object was brought home from worker 'alice' with get(): it is not there
# -> any more. Use the value that get() returned, or fetch() next time.

try:
    p.view(7, 7).get()
except RuntimeError as error:  # it failed at bob, and is an instance of what it was there
    tell(error)
    print(isinstance(error, fp.RemoteError), error.worker)
# -> RemoteRuntimeError: RuntimeError in worker 'bob': shape '[7, 7]' is invalid for input of
# -> size 1000000
# -> True bob

# ---- The end: a `with fp.Cluster(...) as cluster:` block does this by itself.

cluster.wait()  # raises an error that nobody has looked at
cluster.close()
print(bob.alive, alice.alive)
# -> False False
