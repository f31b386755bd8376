"""Users' modules and losses whose code can only compute are replayed; all others are not."""

import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, flatten, nn
from torch.nn.functional import relu

from fedproc.client.repeatable import Repeatable
from tests.client.descent import both_ways, programs

WIDTH = 5
COUNTS: list[int] = []


class Net(nn.Module):
    """The net of every tutorial."""

    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.layers = nn.ModuleList([nn.Linear(27, WIDTH), nn.Linear(WIDTH, 4)])
        self.rates = {}.get("none", (0.1, 0.2))
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(relu(self.norm(self.conv(x))), 2)
        x = flatten(x, 1) if x.shape[0] > 0 else x.view(-1, 27)
        for layer in self.layers:
            x = self._drop(layer(x), rate=self.rates[0])
        return x * self.factor / math.sqrt(self.scale) + sum([x.mean() for _ in range(2)])

    def _drop(self, x: Tensor, rate: float = 0.5) -> Tensor:
        return F.dropout(torch.tanh(x), p=rate, training=self.training)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return F.linear(self.emb(x).mean(dim=1), self.emb.weight)


def mixed(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y) + 1e-3 * outputs.pow(2).mean()


@pytest.mark.parametrize("loss", [mixed, lambda outputs, y: F.nll_loss(outputs.log_softmax(1), y)])
def test_the_net_of_every_tutorial_is_replayed_with_the_bits_of_backward(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(n, 1, 8, 8), torch.randint(4, (n,))) for n in (6, 6, 4, 6, 4, 4, 6)]

    assert programs(both_ways(Net(), loss, batches)) == 2


def test_a_weight_that_is_used_twice_and_a_buffer_that_counts() -> None:
    torch.manual_seed(0)
    batches = [(torch.randint(9, (6, 3)), torch.randint(9, (6,))) for _ in range(5)]

    assert programs(both_ways(Tied(), F.cross_entropy, batches)) == 1


def module(
    forward: Callable[..., Tensor], *methods: Callable[..., Tensor], **attributes: object
) -> nn.Module:
    """A module of a class of its own, with that ``forward`` and other methods."""
    named = {method.__name__: method for method in methods}
    made = type("Own", (nn.Module,), {"forward": forward, **named})()
    made.layer = nn.Linear(6, 4)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def counts(self: nn.Module, x: Tensor) -> Tensor:
    self.calls = self.calls + 1
    return self.layer(x) * self.calls


def remembers(self: nn.Module, x: Tensor) -> Tensor:
    self.log.append(1)
    return self.layer(x) * len(self.log)


def draws(self: nn.Module, x: Tensor) -> Tensor:
    return self.layer(x) * random.random()


def reads(self: nn.Module, x: Tensor) -> Tensor:
    return self.layer(x) * len(COUNTS)


def writes(self: nn.Module, x: Tensor) -> Tensor:
    global WIDTH
    WIDTH = 5
    return self.layer(x)


def lists(self: nn.Module, x: Tensor) -> Tensor:
    return self.layer(x) * x.tolist()[0][0]


def converts(self: nn.Module, x: Tensor) -> Tensor:
    return self.layer(x) * float(x.numpy()[0, 0])


def seeds(self: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return self.layer(x)


def keeps(self: nn.Module, x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
    return self.layer(x) * len(seen)


def asks(self: nn.Module, x: Tensor) -> Tensor:
    return self.layer(x) * getattr(self, "scale", 1)


def imports(self: nn.Module, x: Tensor) -> Tensor:
    import time

    return self.layer(x) * time.time()


def registers(self: nn.Module, x: Tensor) -> Tensor:
    self.register_buffer("last", x)
    return self.layer(x)


def calls(self: nn.Module, x: Tensor) -> Tensor:
    return self.layer(counted(x))


def counted(x: Tensor) -> Tensor:
    return x


def closed_over(x: Tensor) -> Callable[..., Tensor]:
    return lambda self, inputs: self.layer(inputs) + x.sum()


def whole(self: nn.Module, x: Tensor) -> Tensor:
    return self.layer(x)


def doubles(self: nn.Module, x: Tensor) -> Tensor:
    self.double()
    return self.layer(x.double())


def halves_a_part(self: nn.Module, x: Tensor) -> Tensor:
    return torch.add(self.layer(x), self.layer.half()(x.half()))


def moves(self: nn.Module, x: Tensor) -> Tensor:
    return torch.maximum(self.layer(x), self.to(torch.float64)(x))


def has_another_name(self: nn.Module, x: Tensor) -> Tensor:
    module = self
    return self.layer(x) + module.double()(x)


def names_a_part(self: nn.Module, x: Tensor) -> Tensor:
    part = self.layer
    return torch.add(part(x), part.half()(x))


def lists_parts(self: nn.Module, x: Tensor) -> Tensor:
    for part in (self.layer,):
        x = part.float()(x)
    return x


def nests(self: nn.Module, x: Tensor) -> Tensor:
    return sum([self.layer(x), *[self.layer.half()(x) for _ in range(2)]])


def gives_itself(self: nn.Module, x: Tensor) -> Tensor:
    return self.layer(x) + self.converted(x, self)


def converted(self: nn.Module, x: Tensor, module: nn.Module) -> Tensor:
    return module.double()(x)


def converts_tensors(self: nn.Module, x: Tensor) -> Tensor:
    out = self.layer(x).double() * self.factor.to(x.dtype)
    return out.float() + x.double().to(x.dtype).sum()


IMPURE: dict[str, Callable[[], nn.Module]] = {
    "counts": lambda: module(counts, calls=0),
    "remembers": lambda: module(remembers, log=[]),
    "draws": lambda: module(draws),
    "reads": lambda: module(reads),
    "writes": lambda: module(writes),
    "lists": lambda: module(lists),
    "converts": lambda: module(converts),
    "seeds": lambda: module(seeds),
    "keeps": lambda: module(keeps),
    "asks": lambda: module(asks),
    "imports": lambda: module(imports),
    "registers": lambda: module(registers),
    "calls": lambda: module(calls),
    "doubles": lambda: module(doubles),
    "halves a part": lambda: module(halves_a_part),
    "moves": lambda: module(moves),
    "has another name": lambda: module(has_another_name),
    "names a part": lambda: module(names_a_part),
    "lists parts": lambda: module(lists_parts),
    "nests": lambda: module(nests),
    "gives itself": lambda: module(gives_itself, converted),
    "closed over": lambda: module(closed_over(torch.ones(2))),
    "a list": lambda: module(whole, log=[]),
    "a tensor": lambda: module(whole, constant=torch.ones(2)),
    "a name of what reads values": lambda: module(whole, numpy=nn.Linear(1, 1)),
    "another base": lambda: type("Own", (Net,), {})(),
    "a property": lambda: type("Own", (nn.Module,), {"forward": whole, "p": property(len)})(),
    "another call": lambda: type("Own", (nn.Module,), {"forward": whole, "__call__": whole})(),
    "another train": lambda: type("Own", (nn.Module,), {"forward": whole, "train": whole})(),
    "attributes": lambda: type("Own", (nn.Module,), {"forward": whole, "__getattr__": whole})(),
    "another method": lambda: type("Own", (nn.Module,), {"forward": whole, "log": counts})(),
    "no forward": nn.Module,
}


@pytest.mark.parametrize("name", IMPURE)
def test_code_that_can_do_more_than_compute_takes_the_ordinary_way(name: str) -> None:
    assert not Repeatable(nn.Sequential(IMPURE[name]()), F.cross_entropy).holds()
    assert Repeatable(nn.Sequential(module(whole)), F.cross_entropy).holds()


def test_tensors_may_be_converted_but_not_modules() -> None:
    model = module(converts_tensors, factor=nn.Parameter(torch.ones(())))
    assert Repeatable(model, F.cross_entropy).holds()


def test_a_branch_on_values_is_taken_anew_each_time() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)

    torch.manual_seed(0)
    x, y = torch.rand(5, 6), torch.randint(4, (5,))

    found = both_ways(module(forward), F.cross_entropy, [(x, y), (x, y), (-x, y), (x, y), (-x, y)])

    assert programs(found) == 0


def test_what_was_read_may_change() -> None:
    global WIDTH

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.layer(x) * WIDTH

    model = module(forward)
    repeatable = Repeatable(model, F.cross_entropy)
    assert repeatable.holds()
    WIDTH = 7
    try:
        assert not repeatable.holds()
    finally:
        WIDTH = 5
    type(model).forward = whole
    assert not repeatable.holds()


def test_a_method_of_torch_that_somebody_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    repeatable = Repeatable(nn.Sequential(nn.Linear(6, 4), nn.Dropout()), F.cross_entropy)
    assert repeatable.holds()

    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)

    assert not repeatable.holds()
