"""How much the random tests try: little in the suite, more with FEDPROC_FUZZ.

``FEDPROC_FUZZ=50 pytest tests/fuzz -o timeout=0`` makes fifty times as many examples, other ones in
every run. Without it the number is fixed, and under CI the examples are, too.
"""

import os

from hypothesis import HealthCheck, settings


def amount(examples: int, steps: int = 50) -> settings:
    """Settings for ``examples`` examples, of a state machine with up to ``steps`` steps each."""
    times = float(os.environ.get("FEDPROC_FUZZ", "0"))
    more = {"derandomize": False, "database": None} if times else {}
    return settings(
        max_examples=max(1, int(examples * (times or 1))),
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        **more,
    )
