"""What lasts of an aggregator, to a file and back. Runs in the parent.

The model (frozen parameters and buffers too), the strategy's state, what clients keep, the round
and the history. Random streams derive from the seed and the round, so there are none to save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from fedproc.errors import CheckpointError, FedprocError
from fedproc.federated import plainstate, tensorfile
from fedproc.federated.history import Evaluation, History, RoundRecord
from fedproc.federated.mechanism import Ledger, Mechanism

if TYPE_CHECKING:
    import os

    from torch import Tensor, nn

    from fedproc.federated.strategies import State, Strategy


@dataclass(frozen=True, slots=True)
class Identity:
    """What must be the same when a run continues."""

    clients: tuple[str, ...]
    seed: int
    strategy: Strategy
    mechanism: Mechanism | None = None


@dataclass(frozen=True, slots=True)
class Saved:
    """What changes from round to round, besides the model.

    Attributes:
        round: Number of the last round.
        state: State of the strategy.
        kept: Client -> what it keeps.
        history: Records of the rounds.
        ledger: What differential privacy has cost; None without it.
    """

    round: int
    state: State
    kept: Mapping[str, dict[str, Any]]
    history: History
    ledger: Ledger | None = None


def save(path: str | os.PathLike[str], model: nn.Module, identity: Identity, saved: Saved) -> None:
    """Writes a checkpoint; it replaces an older one as a whole.

    Raises:
        TypeError: A client keeps something that cannot be saved.
        OSError: The file cannot be written, or is no regular file.
    """
    kept: dict[str, Tensor] = {}
    document = {
        "clients": list(identity.clients),
        "seed": identity.seed,
        "strategy": _class_name(identity.strategy),
        "privacy": _privacy(identity),
        "ledger": saved.ledger and [saved.ledger.rounds, saved.ledger.clip_norm],
        "round": saved.round,
        "kept": [
            [client, plainstate.encode(value, f"state of client {client}", kept)]
            for client, value in saved.kept.items()
        ],
        "history": [_encode_record(record) for record in saved.history],
    }
    tensors = {f"model/{name}": tensor.detach().cpu() for name, tensor in _tensors(model)}
    tensors.update({f"strategy/{name}": tensor for name, tensor in saved.state.items()})
    tensors.update({f"kept/{name}": tensor for name, tensor in kept.items()})
    tensorfile.write(path, document, tensors)


def load(path: str | os.PathLike[str], model: nn.Module, identity: Identity) -> Saved:
    """Reads a checkpoint into ``model`` and returns the rest.

    Raises:
        CheckpointError: The file is damaged.
        ValueError: The file is of another model, strategy, seed or other clients; the model is
            unchanged.
        OSError: The file cannot be read.
    """
    document, tensors = tensorfile.read(path)
    try:
        parts = [document.get(name) for name in ("seed", "strategy", "privacy")]
        parts = [tuple(document["clients"]), *parts]
        kept = _part(tensors, "kept/")
        saved = Saved(
            round=document["round"],
            state=_part(tensors, "strategy/"),
            kept={client: plainstate.decode(data, kept) for client, data in document["kept"]},
            history=History(_decode_record(data) for data in document["history"]),
            ledger=_decode_ledger(document.get("ledger"), identity),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} lacks parts of a checkpoint: {error!r}") from error
    _require_same(path, identity, parts)
    _load_model(path, model, _part(tensors, "model/"))
    return saved


def _require_same(path: str | os.PathLike[str], identity: Identity, parts: list[Any]) -> None:
    names = ("clients", "seed", "strategy", "privacy")
    here = (identity.clients, identity.seed, _class_name(identity.strategy), _privacy(identity))
    for name, theirs, ours in zip(names, parts, here, strict=True):
        if theirs != ours:
            _refuse(path, f"its {name} {_short(theirs)}, here {_short(ours)}")


def _load_model(path: str | os.PathLike[str], model: nn.Module, found: dict[str, Tensor]) -> None:
    here = dict(_tensors(model))
    if found.keys() != here.keys():
        differing = sorted(found.keys() ^ here.keys())
        _refuse(path, f"its model has other tensors: {_short(differing)}")
    for name, tensor in here.items():
        there = (tuple(found[name].shape), found[name].dtype)
        if there != (tuple(tensor.shape), tensor.dtype):
            _refuse(path, f"{name!r} is {there} there, {(tuple(tensor.shape), tensor.dtype)} here")
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(found[name])


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Lists parameters and buffers, frozen ones too, tied ones once."""
    return [*model.named_parameters(), *model.named_buffers()]


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _class_name(strategy: Strategy) -> str:
    return f"{type(strategy).__module__}.{type(strategy).__qualname__}"


def _refuse(path: str | os.PathLike[str], why: str) -> NoReturn:
    raise ValueError(f"{path} belongs to another run: {why}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _encode_record(record: RoundRecord) -> dict[str, Any]:
    data = record.to_dict()
    if record.evaluation is not None:
        # metrics of the user may be anything; what JSON cannot hold is kept as text
        metrics = data["evaluation"]["metrics"]
        data["evaluation"]["metrics"] = {n: _plain(value) for n, value in metrics.items()}
    return data


def _plain(value: object) -> Any:
    return value if isinstance(value, (type(None), bool, int, float, str, list)) else repr(value)


def _privacy(identity: Identity) -> dict[str, Any] | None:
    return None if identity.mechanism is None else identity.mechanism.identity()


def _decode_ledger(data: list[Any] | None, identity: Identity) -> Ledger | None:
    if data is None or identity.mechanism is None:
        return None
    rounds, clip_norm = data
    return Ledger(identity.mechanism, int(rounds), float(clip_norm))


def _decode_record(data: dict[str, Any]) -> RoundRecord:
    evaluation = data.pop("evaluation")
    failures = {client: FedprocError(text) for client, text in data.pop("failures").items()}
    for name in ("clients", "accepted", "skipped"):
        data[name] = tuple(data[name])
    found = None if evaluation is None else Evaluation(**evaluation)
    return RoundRecord(**data, failures=failures, evaluation=found)
