"""The facade: one sorted list of names, all of them there, and importing it costs nothing."""

import inspect
import subprocess
import sys

import pytest

import fedproc
from fedproc import errors

PROMISED = {
    "Cluster", "group", "gather", "as_completed", "weighted_average", "hook_torch", "unhook_torch",
    "federate", "FederatedDataset", "FederatedDataLoader", "partition", "strategies",
    "LocalTraining", "Aggregator", "FedAvg",
}  # fmt: skip
ERRORS = {
    name
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, errors.FedprocError)
}


def test_names_are_sorted_and_given_once():
    assert list(fedproc.__all__) == sorted(set(fedproc.__all__))


@pytest.mark.parametrize("name", fedproc.__all__)
def test_every_name_resolves(name):
    assert getattr(fedproc, name) is not None
    assert name in dir(fedproc)


def test_what_the_documentation_promises_is_exported():
    assert sorted((PROMISED | ERRORS) - set(fedproc.__all__)) == []


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Clutser"):
        _ = fedproc.Clutser


@pytest.mark.parametrize("heavy", ["torch", "numpy", "sklearn", "matplotlib"])
def test_import_is_light(heavy):
    code = f"import sys, fedproc; print({heavy!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
