"""Torch's compiler comes to a worker when something is compiled, and is then as if always there."""

import os
import subprocess
import sys

import pytest
import torch

import fedproc as fp


@pytest.fixture
def bob():
    with fp.Cluster(["bob"]) as cluster:
        yield cluster["bob"]


def _steps(kind) -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([parameter], lr=0.5)
    parameter.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    return parameter.detach()


def _is_loaded() -> bool:
    return "torch._dynamo.eval_frame" in sys.modules


def test_making_and_using_optimizers_does_not_load_it(bob):
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop):
        assert torch.equal(bob.run(_steps, kind).get(), _steps(kind))
    assert bob.run(_is_loaded).get() is False


def _compile_after_a_step() -> tuple[list[float], bool, bool]:
    _steps(torch.optim.SGD)
    double = torch.compile(lambda x: 2 * x, backend="eager")
    doubled = double(torch.ones(2)).tolist()
    _steps(torch.optim.SGD)
    raw = torch.optim.Optimizer.add_param_group.__wrapped__
    marked = vars(raw)["__dynamo_disable"]
    return doubled, _is_loaded(), bool(getattr(marked, "_torchdynamo_disable", False))


def test_compiling_loads_it_and_marks_what_was_used_before(bob):
    assert bob.run(_compile_after_a_step).get() == ([2.0, 2.0], True, True)


def _disable() -> bool:
    return bool(torch._dynamo.disable(_steps)._torchdynamo_disable)


def _reached_by_name() -> bool:
    import torch._dynamo.config as config
    from torch._dynamo import optimize

    return optimize is sys.modules["torch._dynamo"].optimize and config is torch._dynamo.config


def _in_one_piece() -> bool:
    import torch._dynamo.config as config

    config.suppress_errors = True
    there = sys.modules["torch._dynamo.eval_frame"].config
    spec = config.__spec__
    return there is config and there.suppress_errors and type(spec.loader).__name__ != "_Submodules"


def _of_its_parts() -> bool:
    from torch._dynamo.backends.registry import list_backends

    return list_backends is torch._dynamo.list_backends


def _kept_under_another_name() -> bool:
    import torch._dynamo as dynamo
    from torch._dynamo import graph_break

    dynamo.graph_break("nothing happens")
    dynamo.reset()
    graph_break("there is no graph here")
    return dynamo.graph_break is torch._dynamo.graph_break


def _listed() -> bool:
    return "optimize" in dir(torch._dynamo)


@pytest.mark.parametrize(
    "use",
    [_disable, _reached_by_name, _in_one_piece, _of_its_parts, _kept_under_another_name, _listed],
)
def test_whatever_a_user_asks_of_it_is_answered_by_the_real_module(bob, use):
    assert bob.run(use).get() is True
    assert bob.run(_is_loaded).get() is True


def test_a_worker_that_was_executed_does_without_it_too():
    code = (
        "import fedproc as fp, sys, torch\n"
        "def step():\n"
        "    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1).step()\n"
        "    return 'torch._dynamo.eval_frame' in sys.modules\n"
        "with fp.Cluster(['bob']) as c:\n"
        "    print(c['bob'].run(step).get())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FEDPROC_START": "exec"},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("False\n", "")
