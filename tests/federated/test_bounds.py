"""Memory of many clients: counted exactly, in blocks and bytes of the arenas."""

import torch

from fedproc.federated import holding
from fedproc.federated.data import federate

ROW_BYTES = 16 << 10
BLOCK_BYTES = 8 * ROW_BYTES


def wide(rows, start=0):
    """Rows so wide that every block goes through shared memory."""
    x = torch.arange(start, start + rows, dtype=torch.float32)[:, None].repeat(1, ROW_BYTES // 4)
    return x, torch.arange(start, start + rows)


def test_rows_on_their_way_to_the_workers_take_two_blocks_however_many_clients(
    cluster, monkeypatch
):
    monkeypatch.setattr(holding, "_BLOCK_BYTES", BLOCK_BYTES)
    arena, used, send = cluster["alice"].link.arena, [], holding._send_block

    def counting(*args, **options):
        block = send(*args, **options)
        used.append(arena.used_bytes)
        return block

    monkeypatch.setattr(holding, "_send_block", counting)
    data = federate(wide(480), cluster, clients=240)
    assert len(used) >= 240 // 4
    assert max(used) <= 2 * BLOCK_BYTES
    assert arena.used_bytes == 0
    x, y = data["client-239"]
    assert x.fetch()[:, 0].tolist() == y.fetch().tolist()


def test_a_client_with_more_rows_than_a_block_has_one_of_its_own(cluster, monkeypatch):
    monkeypatch.setattr(holding, "_BLOCK_BYTES", BLOCK_BYTES)
    pairs = {"a": wide(2), "b": wide(20, 2), "c": wide(1, 22), "d": wide(2, 23)}
    sources = {client: holding.RowsSource(*pair) for client, pair in pairs.items()}
    blocks = holding.hold(cluster["bob"], sources, private=False)
    assert [dict(block.spans) for block in blocks] == [
        {"a": (0, 2)},
        {"b": (0, 20)},
        {"c": (0, 1), "d": (1, 3)},
    ]
    for block in blocks:
        for client, (start, stop) in block.spans.items():
            x, y = pairs[client]
            assert torch.equal(block.x[start:stop].fetch(), x)
            assert torch.equal(block.y[start:stop].fetch(), y)
