"""What is replayed has the bits of autograd; what may differ from step to step is not replayed."""

import functools
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from fedproc.client.capture import MOST_SHAPES
from fedproc.client.gradients import Gradients
from fedproc.client.repeatable import _LOSSES, _MODULES, Repeatable
from tests.client.descent import both_ways, programs

IMAGE = (3, 8, 8)
VOLUME = (2, 4, 4, 4)
SEQUENCE = (3, 12)

Make = Callable[[], nn.Module]


def tied() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(6, 4))


# name -> the layers, the shape of a row
NETS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 4), (6,)),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4)),
        (6,),
    ),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, 4)),
        (6,),
    ),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(12, 5), nn.GELU(), nn.Flatten(), nn.Linear(15, 4)),
        SEQUENCE,
    ),
    "in place": (
        lambda: nn.Sequential(
            nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ELU(inplace=True), nn.Linear(5, 4)
        ),
        (6,),
    ),
    "BatchNorm1d": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)),
        (6,),
    ),
    "BatchNorm2d": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 4)
        ),
        IMAGE,
    ),
    "BatchNorm3d": (
        lambda: nn.Sequential(
            nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)
        ),
        VOLUME,
    ),
    "no statistics": (
        lambda: nn.Sequential(
            nn.Linear(6, 5),
            nn.BatchNorm1d(5, affine=False, track_running_stats=False),
            nn.Linear(5, 4),
        ),
        (6,),
    ),
    "LayerNorm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.SiLU(), nn.Linear(5, 4)),
        (6,),
    ),
    "GroupNorm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Mish(), nn.Flatten(), nn.Linear(144, 4)
        ),
        IMAGE,
    ),
    "Dropout": (
        lambda: nn.Sequential(
            nn.Dropout(0.2), nn.Linear(6, 5), nn.Dropout(0.5, inplace=True), nn.Linear(5, 4)
        ),
        (6,),
    ),
    "Dropout1d": (
        lambda: nn.Sequential(nn.Dropout1d(0.3), nn.Flatten(), nn.Linear(36, 4)),
        SEQUENCE,
    ),
    "Dropout2d": (
        lambda: nn.Sequential(
            nn.Dropout2d(0.3), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 4)
        ),
        IMAGE,
    ),
    "Dropout3d": (
        lambda: nn.Sequential(nn.Dropout3d(0.3), nn.Flatten(), nn.Linear(128, 4)),
        VOLUME,
    ),
    "Conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 3), nn.LeakyReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(20, 4)
        ),
        SEQUENCE,
    ),
    "Conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 4),
        ),
        IMAGE,
    ),
    "same": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 4),
        ),
        IMAGE,
    ),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, groups=3, stride=2, dilation=2, bias=False),
            nn.PReLU(),
            nn.Flatten(),
            nn.Linear(24, 4),
        ),
        IMAGE,
    ),
    "channels last": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 4)
        ).to(memory_format=torch.channels_last),
        IMAGE,
    ),
    "Conv3d": (
        lambda: nn.Sequential(
            nn.Conv3d(2, 3, 2), nn.Softplus(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(3, 4)
        ),
        VOLUME,
    ),
    "ConvTranspose1d": (
        lambda: nn.Sequential(
            nn.ConvTranspose1d(3, 2, 3), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(14, 4)
        ),
        SEQUENCE,
    ),
    "ConvTranspose2d": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 2, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 4)
        ),
        IMAGE,
    ),
    "ConvTranspose3d": (
        lambda: nn.Sequential(
            nn.ConvTranspose3d(2, 2, 2), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(16, 4)
        ),
        VOLUME,
    ),
    "AdaptiveAvgPool1d": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(12, 4)),
        SEQUENCE,
    ),
    "AdaptiveAvgPool3d": (
        lambda: nn.Sequential(
            nn.AdaptiveAvgPool3d(2), nn.Unflatten(1, (1, 2)), nn.Flatten(), nn.Linear(16, 4)
        ),
        VOLUME,
    ),
    "Embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 5, padding_idx=0), nn.Flatten(), nn.Linear(15, 4)),
        (3,),
    ),
    "tied": (tied, (6,)),
    "frozen": (
        lambda: nn.Sequential(nn.Linear(6, 5).requires_grad_(False), nn.ReLU(), nn.Linear(5, 4)),
        (6,),
    ),
    "float64": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double(), (6,)),
    "bfloat16": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).bfloat16(),
        (6,),
    ),
    **{
        kind.__name__: (
            lambda kind=kind: nn.Sequential(nn.Linear(6, 5), kind(), nn.Linear(5, 4)),
            (6,),
        )
        for kind in (
            nn.Identity,
            nn.SELU,
            nn.CELU,
            nn.Sigmoid,
            nn.Hardtanh,
            nn.Softsign,
            nn.LogSigmoid,
        )
    },
    **{
        kind.__name__: (
            lambda kind=kind: nn.Sequential(nn.Linear(6, 5), kind(dim=1), nn.Linear(5, 4)),
            (6,),
        )
        for kind in (nn.Softmax, nn.LogSoftmax)
    },
}

LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "cross_entropy": (F.cross_entropy, "class"),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), "class"),
    "weights": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5, 1.5]), ignore_index=2),
        "class",
    ),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=2), "class"),
    "sum": (nn.CrossEntropyLoss(reduction="sum", ignore_index=2), "class"),
    "probabilities": (nn.CrossEntropyLoss(), "unit"),
    "nll_loss": (F.nll_loss, "class"),
    "NLLLoss": (nn.NLLLoss(), "class"),
    **{
        loss.__name__: (loss, "number")
        for loss in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
    },
    **{
        loss.__name__: (loss(), "number")
        for loss in (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
    },
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, "unit"),
    "BCEWithLogitsLoss": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0, 4.0])),
        "unit",
    ),
}


def targets(kind: str, rows: int) -> Tensor:
    if kind == "class":
        return torch.randint(4, (rows,))
    return torch.rand(rows, 4) if kind == "unit" else torch.randn(rows, 4)


def inputs(model: nn.Module, rows: int, shape: tuple[int, ...]) -> Tensor:
    if any(isinstance(part, nn.Embedding) for part in model.modules()):
        return torch.randint(9, (rows, *shape))
    return torch.randn(rows, *shape, dtype=next(model.parameters()).dtype)


@pytest.mark.parametrize("name", NETS)
def test_every_module_of_torch_gets_the_bits_of_backward(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NETS[name]
    model = make()
    sizes = [5, 5, 3, 5, 3, 5, 3, 3]

    batches = [(inputs(model, rows, shape), targets("class", rows)) for rows in sizes]

    assert programs(both_ways(model, nn.CrossEntropyLoss(), batches)) == 2


def test_every_module_is_tried_above() -> None:
    tried = {type(part) for make, _ in NETS.values() for part in make().modules()}

    assert set(_MODULES) <= tried
    assert set(_LOSSES) <= {type(loss) for loss, _ in LOSSES.values()} | {nn.BCELoss}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_gets_the_bits_of_backward(name: str) -> None:
    torch.manual_seed(0)
    loss, kind = LOSSES[name]
    last = nn.LogSoftmax(dim=1) if "nll" in name.lower() else nn.Identity()
    model = nn.Sequential(nn.Linear(6, 4), last)

    batches = [(torch.randn(5, 6), targets(kind, 5)) for _ in range(5)]

    assert programs(both_ways(model, loss, batches)) == 1


@pytest.mark.parametrize("loss", [nn.BCELoss(), F.binary_cross_entropy])
def test_a_loss_of_probabilities(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Sigmoid())

    assert programs(both_ways(model, loss, [(torch.randn(5, 6), torch.rand(5, 4))] * 4)) == 1


class Own(nn.Sequential):
    """A user's module: it may do anything."""


class Unhashable:
    __hash__ = None

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y)


def counted(loss: Tensor) -> Tensor:
    return loss


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


ORDINARY: dict[str, Callable[[], tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]]] = {
    "a user's class": lambda: (Own(nn.Linear(6, 4)), F.cross_entropy),
    "a user's loss": lambda: (plain(), lambda outputs, y: counted(F.cross_entropy(outputs, y))),
    "an unhashable loss": lambda: (plain(), Unhashable()),
    "parametrized": lambda: (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))),
        F.cross_entropy,
    ),
    "counting": lambda: (
        nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 4)),
        F.cross_entropy,
    ),
    "evaluating": lambda: (
        nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5).eval(), nn.Linear(5, 4)),
        F.cross_entropy,
    ),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_what_may_differ_from_step_to_step_takes_the_ordinary_way(name: str) -> None:
    torch.manual_seed(0)
    model, loss = ORDINARY[name]()

    batches = [(inputs(model, 5, (6,)), targets("class", 5)) for _ in range(4)]

    assert programs(both_ways(model, loss, batches)) == 0


def ready(model: nn.Module) -> tuple[Gradients, Tensor, Tensor]:
    """Gradients that replay batches like the one returned."""
    x, y = torch.randn(5, 6), targets("class", 5)
    gradients = Gradients(model, F.cross_entropy)
    for step in range(3):
        model.zero_grad()
        gradients.begin()
        gradients(x, y, step)
    assert programs(gradients) == 1
    model.zero_grad()
    return gradients, x, y


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 0.5}])
def test_special_embeddings_take_the_ordinary_way(options: dict[str, object]) -> None:
    embedding = nn.Embedding(9, 4, **options)

    assert not Repeatable(nn.Sequential(embedding), F.cross_entropy).holds()
    assert Repeatable(nn.Sequential(nn.Embedding(9, 4)), F.cross_entropy).holds()


def test_a_program_runs_without_the_modules() -> None:
    model = plain()
    gradients, x, y = ready(model)
    model[1].forward = None  # from here on it could not be called

    gradients(x, y, 3)

    assert model[0].weight.grad is not None


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], object]] = {
    "forward": lambda model, note: model[1].register_forward_hook(note),
    "before": lambda model, note: model[1].register_forward_pre_hook(note),
    "backward": lambda model, note: model[2].register_full_backward_hook(note),
    "before backward": lambda model, note: model[2].register_full_backward_pre_hook(note),
    "parameter": lambda model, note: model[0].weight.register_hook(note),
    "accumulated": lambda model, note: model[0].weight.register_post_accumulate_grad_hook(note),
    "replaced": lambda model, note: setattr(
        model[1], "forward", lambda x: (note(), torch.relu(x))[1]
    ),
    "everywhere": lambda _, note: modules.register_module_forward_hook(note),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_is_added_later_is_called(name: str) -> None:
    model = plain()
    gradients, x, y = ready(model)
    calls: list[object] = []
    handle = HOOKS[name](model, lambda *args: calls.append(args))

    try:
        gradients.begin()
        gradients(x, y, 3)
    finally:
        if handle is not None:
            handle.remove()

    assert calls


def test_modes_of_torch_are_respected() -> None:
    model = plain()
    gradients, x, y = ready(model)

    gradients.begin()
    exact = gradients(x, y, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.zero_grad()
        gradients.begin()
        rounded = gradients(x, y, 3)
        expected = F.cross_entropy(model(x), y).item()
    assert rounded == expected != exact
    with torch.autograd.set_detect_anomaly(True), torch.autograd.profiler.profile() as seen:
        model.zero_grad()
        gradients.begin()
        gradients(x, y, 3)
    assert "AddmmBackward0" in {event.name for event in seen.function_events}


def test_a_gradient_that_was_left_is_added_to() -> None:
    model = plain()
    gradients, x, y = ready(model)
    gradients(x, y, 3)
    once = model[0].weight.grad.clone()

    gradients(x, y, 4)

    assert torch.equal(model[0].weight.grad, once + once)


def test_a_parameter_that_was_frozen_since_gets_no_gradient() -> None:
    model = plain()
    gradients, x, y = ready(model)
    model[0].weight.requires_grad_(False)

    gradients.begin()
    gradients(x, y, 3)

    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None


def test_errors_are_those_of_the_ordinary_way() -> None:
    model = plain()
    gradients, x, y = ready(model)

    with pytest.raises(FloatingPointError, match="the loss is nan at step 8: lower the learning"):
        gradients(x * float("nan"), y, 7)
    model.zero_grad()
    with pytest.raises(IndexError, match="Target 11 is out of bounds") as caught:
        gradients(x, y + 11 - y, 8)
    assert torch.is_grad_enabled()
    assert F.cross_entropy(model(x), y).requires_grad  # autograd is as it was
    assert caught.tb  # while its frames are alive


def test_a_loss_that_is_not_one_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the loss has shape \(5,\), it must be one number"):
        Gradients(plain(), nn.CrossEntropyLoss(reduction="none"))(
            torch.randn(5, 6), targets("class", 5), 0
        )


def test_rows_are_not_kept() -> None:
    gradients, x, y = ready(plain())
    seen = weakref.ref(x), weakref.ref(y)

    del x, y
    gc.collect()

    assert [reference() for reference in seen] == [None, None]
    assert programs(gradients) == 1


def test_only_so_many_shapes_are_captured() -> None:
    model = nn.Linear(6, 4)
    gradients = Gradients(model, F.cross_entropy)
    gradients.begin()
    for rows in [*range(1, MOST_SHAPES + 5)] * 3:
        model.zero_grad()
        gradients(torch.randn(rows, 6), targets("class", rows), 0)

    assert programs(gradients) == len(gradients._programs._found) == MOST_SHAPES


class Idle(nn.Module):
    """A layer that nobody uses, as heads of other tasks are."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_parameter_that_is_not_used_has_no_gradient() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(5, 6), targets("class", 5)) for _ in range(4)]

    assert programs(both_ways(Idle(), F.cross_entropy, batches)) == 1


def test_smoothing_with_class_weights_takes_the_ordinary_way() -> None:
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss(torch.rand(4), label_smoothing=0.3, ignore_index=2)
    batches = [(torch.randn(50, 6), targets("class", 50)) for _ in range(4)]

    assert programs(both_ways(nn.Linear(6, 4), loss, batches)) == 0


LOSS_CHANGES: dict[str, Callable[[nn.CrossEntropyLoss], object]] = {
    "smoothing": lambda loss: setattr(loss, "label_smoothing", 0.5),
    "weight": lambda loss: setattr(loss, "weight", torch.tensor([9.0, 1.0, 1.0, 1.0])),
    "values": lambda loss: loss.weight.mul_(torch.tensor([9.0, 1.0, 1.0, 1.0])),
}


@pytest.mark.parametrize("name", LOSS_CHANGES)
def test_a_loss_that_is_changed_between_clients_counts(name: str) -> None:
    torch.manual_seed(0)
    model, loss = plain(), nn.CrossEntropyLoss(torch.ones(4))
    x, y = torch.randn(5, 6), targets("class", 5)
    both_ways(model, loss, [(x, y)] * 3)
    gradients = Gradients(model, loss)
    for step in range(3):
        model.zero_grad()
        gradients.begin()
        gradients(x, y, step)
    LOSS_CHANGES[name](loss)

    model.zero_grad()
    gradients.begin()

    assert gradients(x, y, 3) == loss(model(x), y).item()


def test_a_weight_of_the_loss_that_is_learned_gets_its_gradient() -> None:
    model, loss = plain(), nn.CrossEntropyLoss()
    loss.weight = nn.Parameter(torch.ones(4))
    gradients = Gradients(model, loss)
    for step in range(4):
        model.zero_grad()
        loss.weight.grad = None
        gradients.begin()
        gradients(torch.randn(5, 6), torch.rand(5, 4), step)
        assert loss.weight.grad is not None


def test_what_an_optimizer_does_between_the_steps_of_a_client_counts() -> None:
    model = plain()
    gradients, x, y = ready(model)
    gradients.begin()
    calls: list[Tensor] = []
    handle = model[0].bias.register_hook(calls.append)
    gradients(x, y, 3)
    handle.remove()
    model[0].weight.requires_grad_(False)
    model.zero_grad()
    gradients(x, y, 4)

    assert len(calls) == 1
    assert model[0].weight.grad is None
    model.zero_grad()
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        gradients(x, y, 5)


def test_hooks_on_saved_tensors_are_called() -> None:
    model = plain()
    gradients, x, y = ready(model)
    calls: list[Tensor] = []

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (calls.append(t), t)[1], lambda t: t):
        gradients.begin()
        gradients(x, y, 3)

    assert calls


def test_a_method_of_one_module_that_somebody_replaced() -> None:
    conv = nn.Conv2d(1, 2, 3)
    conv._conv_forward = lambda x, weight, bias: F.conv2d(x, weight, bias) * 2

    assert not Repeatable(nn.Sequential(conv), F.cross_entropy).holds()


@pytest.mark.parametrize("forward", [lambda self, x: x, functools.partialmethod(lambda _, x: x)])
def test_a_class_of_torch_that_somebody_replaced_before(
    monkeypatch: pytest.MonkeyPatch, forward: object
) -> None:
    monkeypatch.setattr(nn.ReLU, "forward", forward)

    assert not Repeatable(plain(), F.cross_entropy).holds()


def test_a_loss_that_is_not_finite_is_told_before_anything_else() -> None:
    model = plain()
    gradients = Gradients(model, F.cross_entropy)
    x, y = torch.randn(5, 6), targets("class", 5)
    for step in range(4):
        model.zero_grad()
        gradients.begin()
        with pytest.raises(FloatingPointError, match=f"at step {step + 1}"):
            gradients(x * float("inf"), y, step)


def test_everything_goes_with_the_last_who_holds_it() -> None:
    model = plain()
    gradients, _, _ = ready(model)
    seen = weakref.ref(model[0].weight)
    gc.disable()
    try:
        del gradients, model
        assert seen() is None
    finally:
        gc.enable()
