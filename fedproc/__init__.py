"""fedproc: a local cluster of worker processes for PyTorch, with pointers and federated learning.

Importing it loads nothing heavy: every name is imported when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "ArenaFullError",
    "CSVLogger",
    "CheckpointError",
    "ClosedError",
    "Cluster",
    "CommandTimeoutError",
    "DifferentialPrivacy",
    "EarlyStopping",
    "Evaluation",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedNova",
    "FedProx",
    "FedYogi",
    "FederatedDataLoader",
    "FederatedDataset",
    "FedprocError",
    "GeometricMedian",
    "History",
    "Krum",
    "LocalTraining",
    "Median",
    "ModulePointer",
    "NotPermittedError",
    "NotShippableError",
    "ObjectGoneError",
    "ObjectInfo",
    "ObjectPointer",
    "PlacementError",
    "Pointer",
    "PointerGroup",
    "PrivacyBudgetError",
    "QuorumError",
    "RemoteError",
    "RoundRecord",
    "Scaffold",
    "SecureAggregation",
    "TensorBoard",
    "TensorPointer",
    "TrainContext",
    "TrimmedMean",
    "Worker",
    "WorkerLostError",
    "WorkerNotFoundError",
    "WorkerStartError",
    "WorkerStats",
    "as_completed",
    "audit",
    "columns",
    "federate",
    "gather",
    "group",
    "hook_torch",
    "image_tensor",
    "partition",
    "strategies",
    "unhook_torch",
    "verify_determinism",
    "weighted_average",
]

_NAMES = {
    "client.training": "LocalTraining TrainContext",
    "cluster.averaging": "weighted_average",
    "cluster.cluster": "Cluster",
    "errors": """ArenaFullError CheckpointError ClosedError CommandTimeoutError FedprocError
        NotPermittedError NotShippableError ObjectGoneError PlacementError PrivacyBudgetError
        QuorumError RemoteError WorkerLostError WorkerNotFoundError WorkerStartError""",
    "federated.aggregator": "Aggregator",
    "federated.adapters": "columns image_tensor",
    "federated.callbacks": "CSVLogger EarlyStopping TensorBoard",
    "federated.data": "FederatedDataset federate",
    "federated.determinism": "verify_determinism",
    "federated.history": "Evaluation History RoundRecord",
    "federated.loader": "FederatedDataLoader",
    "federated.secure_aggregation": "SecureAggregation",
    "federated.privacy": "DifferentialPrivacy",
    "federated.strategies": """FedAdagrad FedAdam FedAvg FedAvgM FedNova FedProx FedYogi
        GeometricMedian Krum Median Scaffold TrimmedMean""",
    "remote.completed": "as_completed",
    "remote.gathering": "gather",
    "remote.group": "PointerGroup group",
    "remote.hook": "hook_torch unhook_torch",
    "remote.module": "ModulePointer",
    "remote.object": "ObjectPointer",
    "remote.pointer": "Pointer",
    "remote.tensor": "TensorPointer",
    "remote.worker": "ObjectInfo Worker WorkerStats",
}
"""Module -> the public names that live in it."""
_MODULES = {
    "audit": "audit",
    "partition": "federated.partition",
    "strategies": "federated.strategies",
}
"""Public modules -> where they live."""
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name in _MODULES:
        value: Any = importlib.import_module(f"fedproc.{_MODULES[name]}")
    elif name in _HOME:
        value = getattr(importlib.import_module(f"fedproc.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'fedproc' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*__all__, "__version__"])
