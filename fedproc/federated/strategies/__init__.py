"""Server rules: how the updates of a round become the next model. Runs in the parent.

Each file reads like its paper. Write your own by subclassing :class:`Strategy`.
"""

from fedproc.federated.strategies.contract import State, Strategy
from fedproc.federated.strategies.fedavg import FedAvg, FedAvgM
from fedproc.federated.strategies.fednova import FedNova
from fedproc.federated.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from fedproc.federated.strategies.fedprox import FedProx
from fedproc.federated.strategies.geometric_median import GeometricMedian
from fedproc.federated.strategies.krum import Krum
from fedproc.federated.strategies.median import Median, TrimmedMean
from fedproc.federated.strategies.scaffold import Scaffold

__all__ = [
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedNova",
    "FedProx",
    "FedYogi",
    "GeometricMedian",
    "Krum",
    "Median",
    "Scaffold",
    "State",
    "Strategy",
    "TrimmedMean",
]
