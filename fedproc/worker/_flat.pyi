from typing import Any

from fedproc.wire.frames import Frame
from fedproc.worker.loop import Loop

def prepare(parts: dict[str, Any], numbers: tuple[int | float, ...], /) -> None: ...
def execute(loop: Loop, frame: Frame, /) -> bool | None: ...
