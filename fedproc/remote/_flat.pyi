from typing import Any

from fedproc.remote.link import Link

def prepare(parts: dict[str, Any], numbers: tuple[int, ...], /) -> None: ...
def submit(
    cls: type[Any],
    link: Link | None,
    function: str,
    args: tuple[Any, ...],
    what: str,
    writes: bool,
    private: bool,
    /,
) -> Any: ...
