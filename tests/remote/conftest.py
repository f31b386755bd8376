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
def recording(bob, monkeypatch):
    """All that is sent to bob."""
    recording = Recording(bob.link.channel._frames)
    monkeypatch.setattr(bob.link.channel, "_frames", recording)
    monkeypatch.setattr(bob.link, "wiring", None)  # it has the queue that was there
    return recording


@pytest.fixture
def sent(recording):
    """Frames of the calls that were sent to bob, in order."""
    return recording.seen


@pytest.fixture
def asked(recording):
    """The same of questions and of fetches."""
    return recording.asked


def _watch(link, monkeypatch, names):
    told = []

    def watch(name):
        way = getattr(flat, name)

        def watched(*args):
            before = state(link)
            made = way(*args)
            told.append(made is not None and made is not False)
            assert told[-1] or state(link) == before
            return made

        monkeypatch.setattr(flat, name, watched)

    for name in names:
        watch(name)
    return told


@pytest.fixture
def ways(bob, monkeypatch):
    """Whether each call was taken by the compiled way; one that was not has changed nothing."""
    return _watch(bob.link, monkeypatch, ["submit"])


@pytest.fixture
def asked_ways(bob, monkeypatch):
    """The same of questions and of fetches."""
    return _watch(bob.link, monkeypatch, ["ask", "fetch"])
