"""What tests of flat calls are given."""

import pytest

import fedproc as fp
from fedproc.remote import flat
from tests.remote.ways import Recording, state, take


@pytest.fixture(scope="module")
def shared_cluster():
    with fp.Cluster(["alice", "bob"]) as cluster:
        yield cluster


@pytest.fixture
def quiet_cluster(shared_cluster, monkeypatch):
    """Two workers whose janitor sends nothing, so that frees wait for the next command."""
    for worker in shared_cluster:
        worker.run(take).wait()
        worker.link.outbox.tidy()
        monkeypatch.setattr(worker.link, "tidy", lambda: None)
    return shared_cluster


@pytest.fixture
def sent(bob, monkeypatch):
    """Frames of the calls that were sent to bob, in order."""
    recording = Recording(bob.link.channel._frames)
    monkeypatch.setattr(bob.link.channel, "_frames", recording)
    monkeypatch.setattr(bob.link, "wiring", None)  # it has the queue that was there
    return recording.seen


@pytest.fixture
def ways(bob, monkeypatch):
    """Whether each call was taken by the compiled way; one that was not has changed nothing."""
    told, submit = [], flat.submit

    def watched(*args):
        before = state(bob.link)
        made = submit(*args)
        told.append(made is not None)
        assert made is not None or state(bob.link) == before
        return made

    monkeypatch.setattr(flat, "submit", watched)
    return told
