"""How many contexts of ``torch.autocast`` a thread is in. Runs in workers.

While torch counts one, it keeps what autocast made of parameters, also old values of them.
"""

import torch


def depth() -> int:
    """How many have been entered; torch tells by changing it."""
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


def go_to(wanted: int) -> None:
    """Enter or leave so many that ``wanted`` are entered."""
    now = depth()
    for _ in range(now - wanted):
        torch.autocast_decrement_nesting()
    for _ in range(wanted - now):
        torch.autocast_increment_nesting()
