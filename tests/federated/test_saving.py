"""Where a checkpoint is saved to: folders that are missing, links, and what is no regular file."""

import os
import stat

import pytest

from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from tests.federated.worlds import bits, cross_entropy, linear, sgd, shards

LOCAL = LocalTraining(cross_entropy, sgd)


@pytest.fixture
def data():
    with Cluster(1, transport="inline") as cluster:
        yield FederatedDataset(shards([4, 6]), cluster)


@pytest.fixture
def aggregator(data):
    return Aggregator(linear(), data, LOCAL)


def refused(aggregator, path, kind):
    """The text of what saving raises; the folder is as it was."""
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else None
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the class is compared exactly
        aggregator.save(path)
    assert type(caught.value).__name__ == kind
    assert ".partial" not in str(caught.value)
    assert (sorted(path.parent.iterdir()) if path.parent.is_dir() else None) == before
    return str(caught.value)


def test_a_missing_folder_is_named_and_what_to_do(aggregator, tmp_path):
    text = refused(aggregator, tmp_path / "no" / "such" / "x", "FileNotFoundError")
    assert "the folder to save in does not exist; create it first" in text
    assert repr(str(tmp_path / "no" / "such")) in text
    (tmp_path / "no" / "such").mkdir(parents=True)
    aggregator.save(tmp_path / "no" / "such" / "x")
    assert [path.name for path in (tmp_path / "no" / "such").iterdir()] == ["x"]


def test_a_file_is_no_folder(aggregator, tmp_path):
    (tmp_path / "file").write_text("text")
    text = refused(aggregator, tmp_path / "file" / "x", "NotADirectoryError")
    assert repr(str(tmp_path / "file")) in text
    assert (tmp_path / "file").read_text() == "text"


def test_a_folder_is_refused(aggregator, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    for name in ("folder", "link"):
        text = refused(aggregator, tmp_path / name, "IsADirectoryError")
        assert "name a file in it" in text
        assert repr(str(tmp_path / name)) in text
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_pipe_is_refused_and_stays(aggregator, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        text = refused(aggregator, tmp_path / name, "SpecialFileError")
        assert "no regular file" in text
        assert repr(str(tmp_path / name)) in text
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)
    assert (tmp_path / "link").is_symlink()


def test_an_endless_link_is_refused_and_stays(aggregator, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    refused(aggregator, tmp_path / "loop", "SpecialFileError")
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("there", [True, False])
def test_behind_a_link_the_file_is_written_and_the_link_stays(aggregator, data, tmp_path, there):
    (tmp_path / "runs").mkdir()
    target = tmp_path / "runs" / "run-1"
    if there:
        target.write_text("an older one")
    (tmp_path / "latest").symlink_to("runs/run-1")
    (tmp_path / "best").symlink_to(tmp_path / "latest")
    aggregator.save(tmp_path / "best")
    assert str((tmp_path / "latest").readlink()) == "runs/run-1"
    assert (tmp_path / "best").readlink() == tmp_path / "latest"
    assert target.is_file()
    assert not target.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest", "runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run-1"]
    found = Aggregator.load(tmp_path / "best", linear(seed=5), data, LOCAL)
    assert bits(found.model) == bits(linear())


def test_a_regular_file_is_replaced_and_not_written_to(aggregator, tmp_path):
    (tmp_path / "run").write_text("an older one")
    with (tmp_path / "run").open() as reading:
        aggregator.save(tmp_path / "run")
        assert reading.read() == "an older one"
    assert (tmp_path / "run").read_bytes() != b"an older one"
