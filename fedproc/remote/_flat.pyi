from typing import Any

from fedproc.remote.borrows import Borrow
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
def ask(function: str, args: tuple[Any, ...], what: str, asked: list[Any], /) -> bool: ...
def fetch(link: Link, oid: int, what: str, borrow: Borrow, /) -> bool: ...
