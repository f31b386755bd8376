"""Operators, methods and torch functions give what they give locally."""

import operator

import numpy as np
import torch
import torch.nn.functional as F

from tests.contract.things import each

A = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
B = torch.tensor([[2.0, 0.5], [-1.0, 2.0]])
N = torch.tensor([[1, 2], [3, 4]])
T = torch.tensor([[True, False], [True, True]])

BINARY = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
    operator.matmul,
    operator.eq,
    operator.ne,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
]
BITS = [operator.and_, operator.or_, operator.xor]


def _same(pointer, local):
    remote = pointer.fetch()
    assert remote.dtype is local.dtype
    assert torch.equal(remote.nan_to_num(nan=77), local.nan_to_num(nan=77))


def test_binary_operators(bob):
    p, q = bob.send(A), bob.send(B)
    for op in BINARY:
        _same(op(p, q), op(A, B))


def test_operators_with_numbers_on_either_side(bob):
    p = bob.send(A)
    for op in BINARY:
        if op is not operator.matmul:
            _same(op(p, 2), op(A, 2))
            _same(op(2, p), op(2, A))


def test_operators_on_bits(bob):
    p, q = bob.send(N), bob.send(T)
    for op in BITS:
        _same(op(p, 3), op(N, 3))
        _same(op(3, p), op(3, N))
        _same(op(q, q), op(T, T))
    _same(p << 1, N << 1)
    _same(p >> 1, N >> 1)


def test_unary_operators(bob):
    p = bob.send(A)
    for op in (operator.neg, operator.pos, operator.abs):
        _same(op(p), op(A))
    _same(~bob.send(T), ~T)


def test_in_place_operators(bob):
    for op in (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow):
        p = bob.send(A)
        assert op(p, 2) is p
        _same(p, op(A.clone(), 2))


METHODS = {
    "sum": lambda t: t.sum(),
    "mean of rows": lambda t: t.mean(dim=1, keepdim=True),
    "t": lambda t: t.t(),
    "view": lambda t: t.view(-1),
    "reshape": lambda t: t.reshape(4, 1),
    "clamp": lambda t: t.clamp(min=0, max=3),
    "argmax": lambda t: t.argmax(),
    "to": lambda t: t.to(torch.int32),
    "double": lambda t: t.double(),
    "clone": lambda t: t.clone(),
    "norm": lambda t: t.norm(),
    "softmax": lambda t: t.softmax(dim=0),
    "cumsum": lambda t: t.cumsum(0),
    "masked_fill": lambda t: t.masked_fill(t < 0, 9.0),
    "index_select": lambda t: t.index_select(0, t.new_tensor([1]).long()),
    "new_zeros": lambda t: t.new_zeros(3),
}


def test_methods(bob):
    for name, method in METHODS.items():
        assert torch.equal(method(bob.send(A)).get(), method(A)), name


FUNCTIONS = {
    "add": lambda t, u: torch.add(t, u, alpha=2),
    "mm": lambda t, u: torch.mm(t, u),
    "addmm": lambda t, u: torch.addmm(t, t, u, beta=2),
    "cat": lambda t, u: torch.cat([t, u], dim=1),
    "stack": lambda t, u: torch.stack((t, u)),
    "where": lambda t, u: torch.where(t > 0, t, u),
    "einsum": lambda t, u: torch.einsum("ij,kj->ik", t, u),
    "zeros_like": lambda t, u: torch.zeros_like(t),
    "exp": lambda t, u: torch.exp(t),
    "max of two": lambda t, u: torch.max(t, u),
    "relu": lambda t, u: F.relu(t),
    "celu": lambda t, u: F.celu(t),
    "elu": lambda t, u: F.elu(t),
    "mse_loss": lambda t, u: F.mse_loss(t, u),
    "linear": lambda t, u: F.linear(t, u),
    "cross_entropy": lambda t, u: F.cross_entropy(t, u.argmax(dim=1)),
    "log_softmax": lambda t, u: F.log_softmax(t, dim=-1),
    "one_hot": lambda t, u: F.one_hot(t.argmax(dim=1), 2),
    "linalg": lambda t, u: torch.linalg.inv(t),
    "tensordot": lambda t, u: torch.tensordot(t, u, dims=1),
}


def test_functions(bob):
    for name, function in FUNCTIONS.items():
        remote = function(bob.send(A), bob.send(B)).get()
        local = function(A, B)
        assert remote.dtype is local.dtype, name
        assert torch.equal(remote, local), name


def test_results_stay_on_the_worker(bob):
    p = bob.send(A)
    for result in (p + 1, p.exp(), torch.exp(p), F.relu(p)):
        assert result.worker is bob


INDICES = {
    "row": 1,
    "negative": -1,
    "column": (slice(None), 0),
    "element": (0, 1),
    "slice": slice(0, 1),
    "step": (slice(None, None, 2),),
    "ellipsis": (..., 1),
    "new axis": None,
    "list": [1, 0],
}


def test_indexing(bob):
    p = bob.send(A)
    assert each(INDICES, lambda index: _same(p[index], A[index])) == {}


def test_indexing_by_pointers(bob):
    p, rows = bob.send(A), bob.send(torch.tensor([1, 1, 0]))
    _same(p[p > 0], A[A > 0])
    _same(p[rows], A[[1, 1, 0]])
    _same(p[rows, 0], A[[1, 1, 0], 0])


def test_item_assignment(bob):
    p, local = bob.send(A), A.clone()
    p[0] = 5
    p[1, 0] = bob.send(torch.tensor(9.0))
    p[p == 4.0] = 0
    local[0], local[1] = 5, torch.tensor([9.0, 0.0])
    _same(p, local)


def test_numpy_scalars_are_numbers(bob):
    p = bob.send(A)
    _same(p * np.float32(2), A * 2)
    _same(np.float64(2) * p, A * 2)
    _same(p + np.int64(1), A + 1)
    _same(np.int64(1) - p, 1 - A)
    _same(p[np.int64(1)], A[1])
    _same(bob.run(torch.mul, p, np.float64(3)), A * 3)


def test_random_functions_run_there(bob):
    state = torch.get_rng_state()
    p = bob.send(torch.zeros(1000))
    noise = torch.rand_like(p)
    assert 0.0 <= noise.min().item() < noise.max().item() <= 1.0
    assert torch.equal(torch.get_rng_state(), state)


def test_no_grad_of_the_parent_travels(bob):
    w = bob.send(torch.ones(2, requires_grad=True))
    with torch.no_grad():
        silent = [w * 2, torch.mul(w, 2), w.mul(2), bob.run(torch.mul, w, 2)]
        with torch.enable_grad():
            loud = w * 2
    assert [s.requires_grad for s in silent] == [False] * 4
    assert loud.requires_grad is True
    assert (w * 2).requires_grad is True


def test_no_grad_holds_for_commands_issued_inside_it(bob, gate):
    held = bob.run(gate.hold)
    w = bob.send(torch.ones(2, requires_grad=True))
    with torch.no_grad():
        inside = w * 2
    outside = w * 2
    gate.open()
    assert (inside.requires_grad, outside.requires_grad) == (False, True)
    held.wait()


def test_autocast_of_the_parent_travels(bob):
    p, m = bob.send(torch.ones(2, 2)), bob.send(torch.nn.Linear(2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [p @ p, torch.mm(p, p), m(p), bob.run(torch.mm, p, p)]
    assert [q.dtype for q in inside] == [torch.bfloat16] * 4
    assert (p @ p).dtype is torch.float32
