"""Every message between parent and worker, one record each. Used on both sides.

Commands go down to the worker and carry increasing sequence numbers. *Queries* are commands that
are answered by one ``Value`` or ``Refusal`` with their number. The others are answered only by
``Done`` (everything up to this number was executed), or by ``Failed``. The number of a command is
also the id of the object it makes, so nobody needs to ask for one.
"""

from typing import Any, NamedTuple

# ---- down: parent -> worker --------------------------------------------------------------------


class Call(NamedTuple):
    """Run a function; keep the result where the frame has the flag ``KEEP``."""

    function: Any  # dotted name of a torch or operator function, or a callable
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    modes: tuple[Any, ...] | None  # grad mode, autocast, default dtype where they are not usual
    private: bool = False
    ids: tuple[int, ...] = ()  # places in ``args`` of object ids (messages without externals)


class Put(NamedTuple):
    """Keep a value as a new object."""

    value: Any
    private: bool
    tags: tuple[str, ...]
    description: str


class Compute(NamedTuple):
    """Query: run a function and answer with its result; nothing is kept."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    modes: tuple[Any, ...] | None
    folding: bool = False  # asked by the aggregator: what clients learn from private data may leave
    ids: tuple[int, ...] = ()  # as in Call


class Fetch(NamedTuple):
    """Query: the value of an object."""

    target: int
    lent: bool = False  # a tensor's own memory is asked for, no copy


class Lend(NamedTuple):
    """Hold a tensor where the parent knows that it lies, until ``Release``: it reads already."""

    target: int
    place: tuple[int, int]


class Export(NamedTuple):
    """Query: where the bytes of an object are, for another worker to copy them.

    With ``copy`` the bytes are copied first, so that the object may change at once.
    Answered with ``(flags, payload, ids, cut, optimized, labels)``: the encoded value, all ids the
    object has, whether its autograd history stays behind, whether an optimizer does, its labels.
    """

    target: int
    copy: bool = False


class Import(NamedTuple):
    """Query: keep a copy of what another worker exported. Answered when it is there."""

    slot: int  # the id to keep it under, taken from a Slot; 0: the number of this command
    source: str  # name of the arena the tensors lie in
    flags: int
    payload: bytes
    tags: tuple[str, ...]
    description: str


class Describe(NamedTuple):
    """Query: kind, shape, dtype ... of an object."""

    target: int


DETACHED = "<detached>"
"""Step of a ``Part``: the values of a tensor, without its part in autograd."""


class Part(NamedTuple):
    """Keep a part of an object (attribute path, or gradient) as an object of its own."""

    target: int
    path: tuple[Any, ...]  # str: attribute, int: item


class Free(NamedTuple):
    """Nothing but the frees in front of it (see ``frames.FREES``)."""


class Release(NamedTuple):
    """The parent has copied what these queries exported."""

    queries: tuple[int, ...]


class Slot(NamedTuple):
    """Record that this worker holds a pointer to an object of another worker."""

    worker: str
    target: int


class Define(NamedTuple):
    """Code that cannot be imported, by the digest later commands name it with."""

    digest: bytes
    code: bytes
    forget: bool = False  # all that was defined before


class Attach(NamedTuple):
    """The descriptor of another process's arena waits on the side socket.

    With 0 bytes: that process is gone, its arena is not needed any more.
    """

    name: str
    size_bytes: int


class Inspect(NamedTuple):
    """Query about the worker as a whole: ``"objects"``, ``"stats"``, ``"search"``, ``"clear"``."""

    what: str
    args: tuple[Any, ...] = ()


class Stop(NamedTuple):
    """Leave the loop."""


# ---- up: worker -> parent ----------------------------------------------------------------------


class Ready(NamedTuple):
    """The worker serves; the descriptor of its arena is on the side socket."""

    pid: int
    arena_size: int


class Done(NamedTuple):
    """Everything up to this frame's number was executed."""


class Value(NamedTuple):
    """The answer to a query; a value comes as ``(flags, body)``."""

    payload: Any


class Refusal(NamedTuple):
    """A query failed. ``cause`` is the number of the command that failed first."""

    cause: int
    failure: "Failure | None"


class Failed(NamedTuple):
    """A command without an answer failed; its result, if any, is a tombstone.

    ``cause`` is the number of the command that failed first; its failure was told with it.
    """

    cause: int
    failure: "Failure | None"


class Failure(NamedTuple):
    """An exception as data.

    ``own`` holds a pickled error of fedproc itself, raised as it is; otherwise ``kind`` holds the
    pickled class of the user's exception (None: it cannot be had) and ``state`` its attributes.
    """

    own: bytes | None
    kind: bytes | None
    name: str
    message: str
    traceback: str
    state: bytes | None


COMMANDS: tuple[type[Any], ...] = (
    Call, Put, Compute, Fetch, Export, Import, Describe, Part, Free, Release, Slot,
    Define, Attach, Inspect, Lend, Stop,
)  # fmt: skip
REPLIES: tuple[type[Any], ...] = (Ready, Done, Value, Refusal, Failed)
KIND: dict[type[Any], int] = {
    record: number for table in (COMMANDS, REPLIES) for number, record in enumerate(table)
}
QUERIES = frozenset({Compute, Fetch, Export, Import, Describe, Inspect})
