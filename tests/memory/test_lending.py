"""Memory that a worker can lend: in its arena if there is one, and never shown with old bytes."""

import threading

import pytest
import torch
from torch import nn

from fedproc.client.layout import Layout
from fedproc.client.resident import Resident
from fedproc.client.trainer import Trainer
from fedproc.client.update import Task, pack_tasks
from fedproc.client.work import Span, Work
from fedproc.memory.arena import Arena
from fedproc.memory.lending import lend_from, lendable
from fedproc.memory.tensors import INLINE_BYTES
from tests.federated.worlds import linear


@pytest.fixture
def in_a_worker():
    """Runs a function in a thread that has an arena, as a worker's has."""
    arena = Arena("test", 1 << 24)

    def run(work):
        found = []

        def thread():
            lend_from(arena, {})
            found.append(work(arena))

        started = threading.Thread(target=thread)
        started.start()
        started.join()
        return found[0]

    yield run
    arena.close()


def test_in_a_worker_it_lies_in_the_arena_and_is_free_again_when_dropped(in_a_worker):
    def work(arena):
        memory = lendable(INLINE_BYTES)
        place = arena.offset_of(memory.data_ptr())
        memory.fill_(7)
        del memory
        again = lendable(INLINE_BYTES)
        return place, arena.offset_of(again.data_ptr())

    first, second = in_a_worker(work)
    assert first is not None
    assert first == second


class Uneven(nn.Module):
    """Its block has a gap: what is trained is followed by a buffer that lies on a cache line."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(9_999))
        self.register_buffer("seen", torch.ones(3, dtype=torch.float64))


def fail_on_odd_clients(model, x, y, ctx):
    if int(ctx.client) % 2:
        raise ValueError("odd")
    model.weight.data.mul_(2.0)


def test_of_what_lay_there_before_nothing_is_shown_also_of_a_client_that_fails(in_a_worker):
    layout = Layout.of(Uneven())
    assert layout.payload_bytes < layout.nbytes

    def train(arena):
        memory = lendable(4 * layout.new_blocks(1).shape[1])
        place = arena.offset_of(memory.data_ptr())
        memory.fill_(7)
        del memory
        spans = {str(number): Span(0, number, number + 1) for number in range(4)}
        work = Work(fail_on_odd_clients)
        trainer = Trainer(Uneven(), work, [(torch.zeros(4, 1), torch.zeros(4, 1))], spans)
        start = layout.pack(layout.tensors(Uneven()), layout.new_block())
        tasks = pack_tasks([Task(client, 1, 0, n) for n, client in enumerate(spans)])
        blocks = trainer.train_some(start, tasks).blocks
        assert arena.offset_of(blocks.data_ptr()) == place
        return blocks.clone()

    blocks = in_a_worker(train)
    expected = torch.zeros_like(blocks)
    for row in (0, 2):
        model = Uneven()
        model.weight.data.mul_(2.0)
        layout.pack(layout.tensors(model), expected[row, : layout.nbytes])
    assert torch.equal(blocks, expected)


def test_what_is_small_and_what_is_outside_a_worker_is_ordinary(in_a_worker):
    assert in_a_worker(lambda arena: arena.offset_of(lendable(16).data_ptr())) is None
    assert lendable(INLINE_BYTES).tolist() == [0] * INLINE_BYTES


@pytest.mark.parametrize(
    ("private_rows", "clip_norm", "shown"),
    [(None, None, True), (10, None, False), (None, 1.0, False)],
)
def test_private_and_unclipped_updates_are_not_shown(in_a_worker, private_rows, clip_norm, shown):
    layout = Layout.of(linear(features=10_000))
    task = Task("a", 1, 0, 0, clip_norm)
    work = Work(torch.nn.MSELoss(), private_rows=private_rows)

    def allocated(arena):
        blocks = work.blocks(layout, [task, task])
        assert blocks.count_nonzero() == 0
        return arena.offset_of(blocks.data_ptr()) is not None

    assert in_a_worker(allocated) is shown


@pytest.mark.parametrize("custom", [False, True])
def test_the_model_that_is_trained_lies_apart_from_what_was_sent(in_a_worker, custom):
    def places(arena):
        sent = linear(features=10_000)
        block = arena.allocate(sent.weight.nbytes)
        home = torch.from_numpy(arena.lease(block)).view(torch.float32).view_as(sent.weight)
        sent.weight.data = home.copy_(sent.weight.data)
        resident = Resident(sent, custom=custom)
        assert torch.equal(resident.model.weight, sent.weight)
        both = sent.weight, resident.model.weight
        return [arena.offset_of(weight.data_ptr()) for weight in both]

    sent, trained = in_a_worker(places)
    assert sent is not None
    assert trained is None, "others could read every client's model"
