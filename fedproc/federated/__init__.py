"""Federated learning on a cluster: what the server does. Runs in the parent."""

EXPORTS = {
    "Aggregator": "federated.aggregator",
    "DifferentialPrivacy": "federated.privacy",
    "Evaluation": "federated.history",
    "FedAdagrad": "federated.strategies",
    "FedAdam": "federated.strategies",
    "FedAvg": "federated.strategies",
    "FedAvgM": "federated.strategies",
    "FedNova": "federated.strategies",
    "FedProx": "federated.strategies",
    "FedYogi": "federated.strategies",
    "FederatedDataLoader": "federated.loader",
    "FederatedDataset": "federated.data",
    "GeometricMedian": "federated.strategies",
    "History": "federated.history",
    "Krum": "federated.strategies",
    "LocalTraining": "client.training",
    "Median": "federated.strategies",
    "RoundRecord": "federated.history",
    "Scaffold": "federated.strategies",
    "TrainContext": "client.training",
    "TrimmedMean": "federated.strategies",
    "federate": "federated.data",
    "verify_determinism": "federated.determinism",
}

MODULES = {
    "partition": "federated.partition",
    "strategies": "federated.strategies",
}
