"""Every way out of a worker, tried by somebody who wants a private value.

``OPEN`` is tried on a cluster that runs whatever it is sent, ``RESTRICTED`` on one that runs
registered functions only. ``python -m tests.contract.test_ways_out`` prints the table.
"""

import ctypes
import functools
import logging
import operator
import os
import pickle
import subprocess
import sys
import traceback
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import fedproc as fp
from fedproc.remote import calls, reading
from tests.contract.things import outcome

SECRET = 43210
TELLING = "43210"


def secret(worker):
    """A private vector whose length, sum and largest value are the secret in one way or another."""
    return worker.send(torch.tensor([float(SECRET), 0.0, 1.0]), private=True, tags="secret")


def shown(result):
    """All that an attacker sees of an outcome."""
    if isinstance(result, BaseException):
        return "".join(traceback.format_exception(result)) + repr(vars(result)) + repr(result.args)
    return repr(result)


# ---------------------------------------------------------------- what no cluster lets out


class Box:
    """An object of a class that keeps what it meets."""

    kept = None

    def __add__(self, other):
        self.kept = other
        return 0

    def keep(self, value):
        self.kept = value


class Keeper(nn.Module):
    """A module that hides what it meets in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.place = [torch.zeros(3)]

    def forward(self, x):
        self.place[0].copy_(x)
        return 0


def _raises(error):
    def run(t):
        raise error(str(int(t[0])))

    return run


def _raises_made_class(t):
    raise type("Made" + str(int(t[0])), (ValueError,), {"value": int(t[0])})


def _cause(t):
    try:
        {}[int(t[0])]
    except KeyError as error:
        raise RuntimeError(str(int(t[0]))) from error


def _exits(t):
    raise SystemExit(int(t[0]))


def _noted(t):
    error = ValueError("no")
    error.add_note(str(int(t[0])))
    error.value = int(t[0])
    raise error


def _in_public(p, make, write):
    public = make(p.worker)
    write(public, p)
    return public


OPEN = {
    "get": lambda p, o: p.get(),
    "fetch": lambda p, o: p.fetch(),
    "borrow": lambda p, o: p.borrow().__enter__().tolist(),
    "copy then get": lambda p, o: p.copy().get(),
    "move": lambda p, o: p.move(o).get(),
    "send on (chain)": lambda p, o: p.send(o).get().get(),
    "remote_get of a chain": lambda p, o: p.send(o).remote_get().get(),
    "gather": lambda p, o: fp.gather([p]),
    "item": lambda p, o: p[0].item(),
    "float": lambda p, o: float(p[0]),
    "int": lambda p, o: int(p[0]),
    "complex": lambda p, o: complex(p[0]),
    "index": lambda p, o: operator.index(p[0].long()),
    "bool": lambda p, o: bool(p[0] > SECRET - 1),
    "in": lambda p, o: SECRET in p,
    "equal": lambda p, o: torch.equal(p, p),
    "is_nonzero": lambda p, o: p[0].is_nonzero(),
    "tolist": lambda p, o: p.tolist(),
    "numpy": lambda p, o: p.numpy(),
    "iteration": lambda p, o: [row.get() for row in p],
    "data": lambda p, o: p.data.get(),
    "len of nonzero": lambda p, o: len(p.nonzero()),
    "len of unique": lambda p, o: len(p.unique()),
    "shape of masked_select": lambda p, o: p.masked_select(p > 1).shape,
    "shape of boolean indexing": lambda p, o: p[p > 1].shape,
    "numel of boolean indexing": lambda p, o: p[p > 1].numel(),
    "ndim of a slice by a private number": lambda p, o: p.worker.run(torch.ones, p[0].long()).shape,
    "shape of a slice by a private number": lambda p, o: (
        p.worker.run(lambda t, n: t[: int(n)], p, p[1]).shape
    ),
    "shape after a hidden shape": lambda p, o: (p.nonzero() * 2).shape,
    "len of where": lambda p, o: len(torch.where(p > 1)[0]),
    "len of bincount": lambda p, o: len(p.long().bincount()),
    "classes of one_hot": lambda p, o: functional.one_hot(p.long()[1:]).shape,
    "repeat_interleave": lambda p, o: len(torch.repeat_interleave(p[1:].long())),
    "nbytes in the listing": lambda p, o: [
        info.nbytes for oid, info in p.worker.objects.items() if oid == p.nonzero().wait().id
    ],
    "listing": lambda p, o: list(p.worker.objects.values()),
    "repr": lambda p, o: (repr(p), str(p), f"{p}", repr((p + 1).wait())),
    "search": lambda p, o: p.worker.search("secret")[0].get(),
    "run that returns": lambda p, o: p.worker.run(lambda t: t.tolist(), p).get(),
    "run that returns a size": lambda p, o: (
        p.worker.run(lambda t: torch.zeros(1).expand(int(t[0])), p).shape
    ),
    "run that returns a length": lambda p, o: len(p.worker.run(lambda t: [0] * int(t[0]), p)),
    "run that returns names of parameters": lambda p, o: p.worker.run(
        lambda t: nn.ParameterDict({str(int(t[0])): nn.Parameter(torch.ones(1))}), p
    ).state_dict(),
    "run that pickles": lambda p, o: p.worker.run(lambda t: pickle.dumps(t), p).get(),
    "run that returns a closure": lambda p, o: p.worker.run(lambda t: lambda: t, p)().get(),
    "run that returns a generator": lambda p, o: p.worker.run(
        next, p.worker.run(lambda t: (x for x in t.tolist()), p)
    ).get(),
    "run that raises": lambda p, o: p.worker.run(_raises(ValueError), p).get(),
    "run that raises fedproc's error": lambda p, o: p.worker.run(_raises(fp.FedprocError), p).get(),
    "run that raises a refusal": lambda p, o: (
        outcome(p.worker.run(_raises(fp.NotPermittedError), p).get),
        p.worker.audit(),
    ),
    "run that raises a class it made": lambda p, o: p.worker.run(_raises_made_class, p).get(),
    "run that raises with a cause": lambda p, o: p.worker.run(_cause, p).get(),
    "run that raises with a note and attributes": lambda p, o: p.worker.run(_noted, p).get(),
    "run that exits with a code": lambda p, o: p.worker.run(_exits, p).get(),
    "error of an operation": lambda p, o: p.worker.run(lambda t: {}[int(t[0])], p).get(),
    "error of a shape": lambda p, o: (p.view(3, 1) @ p.view(3, 1)).get(),
    "cluster.wait": lambda p, o: p.worker.run(_raises(ValueError), p).wait(),
    "written into a public tensor": lambda p, o: _in_public(
        p, lambda w: w.send(torch.zeros(3)), lambda public, p: public.copy_(p)
    ).get(),
    "written by Tensor.__iadd__": lambda p, o: _in_public(
        p,
        lambda w: w.send(torch.zeros(3)),
        lambda public, p: public.worker.run(torch.Tensor.__iadd__, public, p),
    ).get(),
    "written by Tensor.__setitem__": lambda p, o: _in_public(
        p,
        lambda w: w.send(torch.zeros(3)),
        lambda public, p: public.worker.run(torch.Tensor.__setitem__, public, 0, p[0]),
    ).get(),
    "written by operator.call": lambda p, o: _in_public(
        p,
        lambda w: w.send(torch.zeros(3)),
        lambda public, p: public.worker.run(operator.call, torch.Tensor.copy_, public, p),
    ).get(),
    "written over a NaN": lambda p, o: _in_public(
        p,
        lambda w: w.send(torch.tensor([float("nan")])),
        lambda public, p: public.worker.run(lambda a, b: a.copy_(b), public, p[1:2]),
    ).get(),
    "written over the value guessed": lambda p, o: _in_public(
        p,
        lambda w: w.send(torch.tensor([float(SECRET)])),
        lambda public, p: public.worker.run(lambda a, b: a.copy_(b), public, p[:1]),
    ).get(),
    "appended to a public list": lambda p, o: _in_public(
        p, lambda w: w.send([]), lambda public, p: public.append(p)
    )[0].get(),
    "iconcat to a public list": lambda p, o: _in_public(
        p,
        lambda w: w.send([]),
        lambda public, p: public.worker.run(operator.iconcat, public, p.worker.run(list, p)),
    ).get(),
    "operator of an object that keeps it": lambda p, o: _in_public(
        p, lambda w: w.send(Box()), lambda public, p: public + p
    ).kept.get(),
    "attribute of a public object": lambda p, o: _in_public(
        p, lambda w: w.send(Box()), lambda public, p: public.keep(p)
    ).kept.get(),
    "attribute of a public module": lambda p, o: _in_public(
        p, lambda w: w.send(Keeper()), lambda public, p: public(p)
    ).place.get(),
    "gradient of a public leaf": lambda p, o: _in_public(
        p,
        lambda w: w.send(torch.ones(3, requires_grad=True)),
        lambda public, p: (public * p).sum().backward(),
    ).grad.get(),
    "state of an optimizer": lambda p, o: (
        _in_public(
            p, lambda w: w.send(nn.Linear(3, 1)), lambda public, p: public(p).sum().backward()
        )
        .state_dict()["weight"]
        .get()
    ),
    "parameters": lambda p, o: _in_public(
        p, lambda w: w.send(nn.BatchNorm1d(1)), lambda public, p: public(p.view(3, 1))
    ).running_mean.get(),
    "a global of shipped code": lambda p, o: _by_global(p),
    "a default argument": lambda p, o: _by_default(p),
    "fold of a foreign result": lambda p, o: _fold(p),
}


_global = None


def _by_global(p):
    def write(t):
        global _global
        _global = int(t[0])

    def read():
        return _global

    write.__module__ = read.__module__ = "__main__"  # as in a script: it travels by value
    p.worker.run(write, p).wait()
    return p.worker.run(read).get()


def _by_default(p):
    def keep(t=None, kept=[]):  # noqa: B006 - that is the attack
        if t is not None:
            kept.append(int(t[0]))
        return list(kept)

    p.worker.run(keep, p).wait()
    return p.worker.run(keep).get()


def _fold(p):
    """As the aggregator does, but with an evaluation of somebody else's rows."""
    from fedproc.client.trainer import Trainer
    from fedproc.client.work import Work

    local = fp.LocalTraining(nn.MSELoss(), torch.optim.SGD)
    worker = p.worker
    trainer = worker.run(Trainer, worker.send(nn.Linear(3, 1)), worker.send(Work(local)))
    rows = (p.view(1, 3), p[:1].view(1, 1))
    block = worker.send(torch.zeros(16, dtype=torch.uint8))
    asked = trainer, "evaluate", block, rows, None, (1, True)
    link, query = calls.fold("fedproc.worker.parts.method", asked, what="evaluate")
    return reading.finish(link, query, "evaluate")


def _tells(result):
    """Whether the attacker learned anything: only a refusal, or nothing, is right."""
    if TELLING in shown(result):
        return True
    refused = result is None or isinstance(result, Exception)
    return not (refused or (isinstance(result, (list, tuple)) and _blank(result)))


def _blank(result):
    """Listings and texts without values are no leak."""
    return isinstance(result, (list, tuple)) and all(
        isinstance(item, (str, tuple, Exception))
        or type(item).__name__ == "ObjectInfo"
        or item == 0
        for item in result
    )


def try_all(cluster, ways):
    """What came out: way -> None, or what an attacker saw."""
    bob, alice = cluster["bob"], cluster["alice"]
    leaks, table = {}, []
    for name, way in ways.items():
        result = outcome(lambda way=way: way(secret(bob), alice))
        verdict = type(result).__name__ if isinstance(result, Exception) else "nothing shown"
        table.append((name, verdict))
        if _tells(result):
            leaks[name] = shown(result)[:300]
    return leaks, table


def test_every_way_out_is_closed(cluster):
    leaks, _ = try_all(cluster, OPEN)
    assert leaks == {}
    assert len(cluster["alice"].objects) == 0


# ---------------------------------------------------------------- what is printed

_log = logging.getLogger("ways-out")


def _prints_python(t):
    print(int(t[0]))
    print(int(t[0]), file=sys.stderr)
    warnings.warn(str(int(t[0])), stacklevel=1)
    _log.warning("%d", int(t[0]))


def _prints_old_streams(t):
    sys.__stdout__.write(str(int(t[0])))  # no end of line: it stays in the buffer
    sys.__stderr__.write(str(int(t[0])))


def _prints_descriptors(t):
    os.write(1, str(int(t[0])).encode())
    os.write(2, str(int(t[0])).encode())


def _prints_c(t):
    libc = ctypes.CDLL(None)
    libc.printf(b"%d", int(t[0]))  # stays in C's buffer
    libc.perror(str(int(t[0])).encode())


def _prints_child(t):
    subprocess.run(["/bin/echo", str(int(t[0]))], check=True)


PRINTED = {
    "print, warnings, logging": _prints_python,
    "old references to the streams": _prints_old_streams,
    "file descriptors": _prints_descriptors,
    "C code": _prints_c,
    "a child process": _prints_child,
}


def test_nothing_is_printed_while_a_private_object_is_in_use(capfd):
    with fp.Cluster(["bob"]) as cluster:
        bob = cluster["bob"]
        for way in PRINTED.values():
            bob.run(way, secret(bob)).wait()
        bob.run(print, "and then again").wait()
    printed = "".join(capfd.readouterr())
    assert TELLING not in printed
    assert "and then again" in printed


# ---------------------------------------------------------------- registered functions only


def registered_sum(t):
    """A function that the owner of the data has looked at."""
    return t.sum()


def unregistered(t):
    """One that nobody has looked at."""
    return t.sum()


class Reduced:
    """A pickle that calls something."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Changing:
    """A pickle that sets the state of something that is there."""

    def __init__(self, target, state):
        self.target, self.state = target, state

    def __reduce__(self):
        return _same, (self.target,), self.state


def _same(thing):
    return thing


def _raw(worker, function, *args, **kwargs):
    """A command as no pointer would send it."""
    return calls.run_there(
        fp.remote.pending.PendingPointer, function, args, kwargs, what="raw", link=worker.link
    ).get()


RESTRICTED = {
    "lambda": lambda p, o: p.worker.run(lambda t: t.sum(), p).wait(),
    "a function of the script": lambda p, o: p.worker.run(_local(p), p).wait(),
    "a function that can be imported": lambda p, o: p.worker.run(unregistered, p).wait(),
    "a class": lambda p, o: p.worker.run(Box).wait(),
    "a partial": lambda p, o: p.worker.run(functools.partial(unregistered), p).wait(),
    "an object of a class": lambda p, o: p.worker.send(Box()).wait(),
    "a module of a class": lambda p, o: p.worker.send(Keeper()).wait(),
    "eval": lambda p, o: p.worker.run(eval, "1").wait(),
    "exec": lambda p, o: p.worker.run(exec, "1").wait(),
    "open": lambda p, o: p.worker.run(open, "/dev/null").wait(),
    "import": lambda p, o: p.worker.run(__import__, "os").wait(),
    "getattr": lambda p, o: p.worker.run(getattr, p, "__class__").wait(),
    "print": lambda p, o: p.worker.run(print, p).wait(),
    "os.system": lambda p, o: p.worker.run(os.system, "true").wait(),
    "torch.load": lambda p, o: p.worker.run(torch.load, "x").wait(),
    "torch.save": lambda p, o: p.worker.run(torch.save, p, "x").wait(),
    "torch.hub.load": lambda p, o: p.worker.run(torch.hub.load, "x").wait(),
    "torch.from_file": lambda p, o: p.worker.run(torch.from_file, "x").wait(),
    "torch.compile": lambda p, o: p.worker.run(torch.compile, "x").wait(),
    "torch.ops.load_library by name": lambda p, o: _raw(p.worker, "torch.ops.load_library", "x"),
    "os.system by name": lambda p, o: _raw(p.worker, "os.system", "true"),
    "builtins.eval by name": lambda p, o: _raw(p.worker, "builtins.eval", "1"),
    "torch's own import of os": lambda p, o: _raw(p.worker, "torch.os.system", "true"),
    "operator.methodcaller": lambda p, o: p.worker.run(operator.methodcaller, "a").wait(),
    "operator.attrgetter": lambda p, o: p.worker.run(operator.attrgetter, "a").wait(),
    "operator.call": lambda p, o: p.worker.run(operator.call, torch.sum, p).wait(),
    "Tensor.apply_": lambda p, o: [p.apply_(abs), o].clear(),
    "method of an object": lambda p, o: p.worker.send([1]).append(p).wait(),
    "attribute that leads into Python": lambda p, o: _raw(
        p.worker, "fedproc.worker.parts.attribute", p.worker.send(nn.Linear(1, 1)), "__class__"
    ),
    "part that leads into Python": lambda p, o: calls.part(
        fp.remote.pending.PendingPointer,
        p.worker.send(nn.Linear(1, 1)),
        ("forward", "__globals__"),
    ).wait(),
    "__reduce__ in a sent object": lambda p, o: p.worker.send(Reduced(os.system, "true")).wait(),
    "__reduce__ in an argument": lambda p, o: p.worker.run(abs, Reduced(eval, "-1")).wait(),
    "__reduce__ in a nested argument": lambda p, o: p.worker.run(
        sum, [Reduced(exec, "1"), 1]
    ).wait(),
    "__reduce__ that writes": lambda p, o: p.worker.send(
        [Reduced(operator.setitem, p.worker.send([0]), 0, p)]
    ).wait(),
    "__reduce__ that unpickles": lambda p, o: p.worker.send(Reduced(pickle.loads, b"N.")).wait(),
    "a module with hooks": lambda p, o: p.worker.send(_hooked()).wait(),
    "code in a packed task": lambda p, o: _packed(p),
    "fold of a foreign result": lambda p, o: _fold(p),
    "registering more": lambda p, o: p.worker._inspect("register", (), 0),
}


def _local(p):
    def shipped(t):
        return t.sum()

    return shipped


def _hooked():
    module = nn.Linear(1, 1)
    module.register_forward_hook(functional.relu)
    return module


def _packed(p):
    from fedproc.client.update import unpack_tasks

    return p.worker.run(unpack_tasks, pickle.dumps(Reduced(eval, "1"))).wait()


@pytest.fixture
def restricted(transport):
    """A cluster that runs two registered functions."""
    with fp.Cluster(
        ["alice", "bob"], transport=transport, functions=[registered_sum, _named_lambda]
    ) as cluster:
        yield cluster
        cluster.close()


_named_lambda = lambda t: t + 1  # noqa: E731 - one that travels by value


def test_registered_functions_run_and_torch_does(restricted):
    bob = restricted["bob"]
    x = bob.send(torch.tensor([1.0, 2.0]))
    assert bob.run(registered_sum, x).get() == 3.0
    assert bob.run(_named_lambda, x).get().tolist() == [2.0, 3.0]
    assert (x * 2).relu()[1].item() == 4.0
    assert functional.softmax(x, dim=0).sum().item() == pytest.approx(1.0)
    assert bob.run(torch.ones, 3).get().tolist() == [1.0, 1.0, 1.0]
    assert bob.run(abs, -7).get() == 7
    model = bob.send(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    optimizer = bob.run(torch.optim.SGD, model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    moved = bob.send(nn.Linear(2, 2)).move(restricted["alice"])
    assert moved.get().weight.shape == (2, 2)


def test_what_is_not_registered_is_refused_with_name_worker_and_remedy(restricted):
    wrong = {}
    for name, way in RESTRICTED.items():
        result = outcome(lambda way=way: way(secret(restricted["bob"]), restricted["alice"]))
        refused = isinstance(result, fp.NotPermittedError)
        unpickling = "UnpicklingError" in str(result)
        unpickable = isinstance(result, fp.NotShippableError)
        if name == "Tensor.apply_":
            result = outcome(restricted.wait)
            refused = isinstance(result, fp.NotPermittedError)
        if not (refused or unpickling or unpickable) or TELLING in shown(result):
            wrong[name] = shown(result)[-400:]
    assert wrong == {}
    error = outcome(restricted["bob"].run(unregistered, 1).get)
    for part in ("unregistered", "'bob'", "functions=[unregistered]"):
        assert part in str(error)


def test_a_pickle_cannot_change_what_is_there(restricted):
    bob = restricted["bob"]
    assert isinstance(
        outcome(bob.send(Changing(nn.Linear, {"forward": torch.relu})).wait), fp.NotPermittedError
    )
    public = bob.send(nn.Linear(1, 1))
    body = Changing(public, {"stolen": secret(bob)})
    assert isinstance(outcome(bob.run(list, [body]).wait), fp.NotPermittedError)
    assert public.get().__dict__.get("stolen") is None


def test_every_way_out_is_closed_with_registered_functions(restricted):
    # where the run that writes is refused, the public object stays as it was, and public
    stays = ("written by operator.call", "written over", "a global", "a default")
    leaks, _ = try_all(restricted, {n: w for n, w in OPEN.items() if not n.startswith(stays)})
    assert leaks == {}


def test_bad_lists_of_functions(transport):
    for wrong in ([3], [functools.partial(abs)], [[].append]):
        with pytest.raises(TypeError, match="neither a function nor a class"):
            fp.Cluster(1, transport=transport, functions=wrong)


if __name__ == "__main__":
    for title, ways, functions in (
        ("whatever it is sent", OPEN, None),
        ("registered functions only", RESTRICTED, [registered_sum]),
    ):
        with fp.Cluster(["alice", "bob"], functions=functions) as shown_cluster:
            print(f"\n{title}")
            for row in try_all(shown_cluster, ways)[1]:
                print("  {:<46} {}".format(*row))
            shown_cluster.close()


# ---------------------------------------------------------------- what an aggregator may ask


def sgd_for_all(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        ":fedproc.client.evaluator:Evaluator._rows",
        "fedproc.client.evaluator.Evaluator._rows",
        "builtins.getattr",
    ],
)
def test_only_a_method_of_a_trainer_may_be_asked_for_what_is_folded(transport, registers, function):
    rows = torch.full((20, 4), float(TELLING)), torch.zeros(20, dtype=torch.int64)
    functions = [sgd_for_all] if registers else None
    with fp.Cluster(1, transport=transport, functions=functions) as cluster:
        data = fp.federate(rows, cluster, clients=1, private=True)
        local = fp.LocalTraining(nn.CrossEntropyLoss(), sgd_for_all, batch_size=5)
        aggregator = fp.Aggregator(nn.Linear(4, 3), data, local)
        aggregator.run(1)
        (client,) = data.clients
        trainer = aggregator._course._crew.trainer(cluster.workers[0].name)
        link, query = calls.fold(function, (trainer, client), what="train")
        with pytest.raises(fp.FedprocError) as refused:
            reading.finish(link, query, "train")
        assert not isinstance(refused.value, fp.WorkerLostError)
        assert TELLING not in str(refused.value)
