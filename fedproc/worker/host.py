"""The state of one worker, and how messages are read into it and written from it.

Runs in the worker. A ``Host`` belongs to one thread: the one that runs the loop.
"""

import contextlib
import io
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedproc.errors import FedprocError, NotShippableError, ObjectGoneError
from fedproc.memory.arena import Arena, Mapped
from fedproc.memory.copying import fresh
from fedproc.memory.sparse import REDUCERS
from fedproc.memory.tensors import (
    INLINE_BYTES,
    Exporter,
    Packer,
    Place,
    Table,
    place_bytes,
    read_place,
    rebuild,
)
from fedproc.transport.base import WorkerSpec, receive_descriptor
from fedproc.transport.channel import Channel
from fedproc.wire import frames
from fedproc.wire.codec import Decoder, Encoder
from fedproc.wire.commands import KIND
from fedproc.worker.audit import AuditLog
from fedproc.worker.failure import UnreadableError
from fedproc.worker.guarded import GuardedDecoder
from fedproc.worker.registered import Registered
from fedproc.worker.store import Entry, ObjectStore, PoisonedError

PARENT = "<parent>"
"""Name of the parent's arena."""


class Host:
    """Objects, memory and channel of a worker."""

    here = os.getpid()

    def __init__(
        self, spec: WorkerSpec, channel: Channel, side: socket.socket, *, is_process: bool
    ) -> None:
        """Create the arena and tell the parent its descriptor.

        ``is_process``: the process is this worker and nothing else.
        """
        self.is_process = is_process
        self.spec = spec
        self.channel = channel
        self.side = side
        self.store = ObjectStore(spec.name)
        self.arena = Arena(spec.name, spec.memory_limit)
        self.mapped: dict[str, Mapped] = {}
        self.definitions: dict[bytes, bytes] = {}
        self.exports: dict[int, Exporter] = {}
        self.used: list[Entry] = []
        self.trouble: Exception | None = None
        self.registered: Registered | None = None  # None: it runs whatever it is sent
        self.min_rows = 1  # with registered functions only: the parent is not believed
        self.registered_code: dict[Any, bytes] = {}
        self.audit = AuditLog()
        self.commands = 0
        self.stopped = False
        self._owner = Host.here

    @property
    def is_forked(self) -> bool:
        """Whether this is a copy of the worker: a command has called fork(), and came back."""
        return self._owner != Host.here

    def require_process(self, error: BaseException | None) -> None:
        """End a process that a command has forked and that came back from it, with ``error``.

        Worker and child have one stream: both would answer, and each read what is for the other.
        """
        if not self.is_forked:
            return
        code = error.code if isinstance(error, SystemExit) else int(error is not None)
        with contextlib.suppress(BaseException):
            if error is None:
                sys.stderr.write(
                    f"worker {self.spec.name!r}: a process that a command forked came back from "
                    "the command. It ends here, without an answer: end such a process with "
                    "os._exit().\n"
                )
            elif not isinstance(error, SystemExit):
                traceback.print_exception(error)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))

    # ---- reading

    def decode(self, frame: frames.Frame) -> tuple[Any, ...]:
        """The fields of a command; entries it refers to are noted in ``used``.

        Frees that ride in front are done first: nothing in the command can refer to them.
        """
        if frame.flags & frames.FREES:
            ids, body = frames.split_frees(frame.body)
            for oid in ids:
                if oid & frames.WHOLE:
                    self.store.remove(oid ^ frames.WHOLE)
                else:
                    self.store.free(oid)
        else:
            body = frame.body
        if frame.flags & frames.PLAIN and self.registered is None:
            fields: tuple[Any, ...] = pickle.loads(body)
            return fields
        return tuple(self.load(body, frame.flags, PARENT))

    def load(self, body: bytes, flags: int, source: str) -> Any:
        """Unpickle ``body``; its tensors lie in the arena named ``source``.

        Raises:
            UnreadableError: the code of what is in it raised its cause.
        """
        stream = io.BytesIO(body)
        tensors: list[torch.Tensor] = []
        if flags & frames.HAS_TENSORS:
            table: Table = self._decoder(stream, _no_external).load()
            shared = bool(flags & frames.SHARED)
            tensors = rebuild(table, lambda place: self._copy(place, source, shared=shared))

        def external(pid: int) -> Any:
            if pid <= 0:
                return tensors[-pid]
            try:
                entry = self.store.entry(pid)
            except (ObjectGoneError, PoisonedError) as error:
                # Raised by the loop once the whole command is read.
                self.trouble = self.trouble or error
                return None
            self.used.append(entry)
            return entry.value

        try:
            return self._decoder(stream, external).load()
        except FedprocError:
            raise
        except Exception as error:
            # An object that is missing may be why: it comes first.
            raise self.trouble or UnreadableError() from error

    def _decoder(self, stream: io.BytesIO, external: Callable[[int], Any]) -> Any:
        if self.registered is None:
            return Decoder(stream, external, self.definitions)
        return GuardedDecoder(stream, external, self.registered)

    def _copy(self, place: Place, source: str, *, shared: bool) -> torch.Tensor:
        nbytes = place_bytes(place)
        if shared:
            target = torch.from_numpy(self.arena.lease(self.arena.allocate(nbytes)))
        else:
            target = fresh(nbytes)
        mapped = self.mapped.get(source)
        return read_place(place, mapped.view if mapped else _nowhere, target)

    # ---- writing

    def encode(
        self,
        value: Any,
        inline_bytes: int = INLINE_BYTES,
        *,
        copy: bool = False,
        by_digest: bool = False,
    ) -> tuple[int, bytes, Exporter]:
        """``(flags, body, exporter)`` of a value on its way out.

        With ``by_digest`` registered code is only named: a worker of the same cluster has it, too.

        Raises:
            NotShippableError: it cannot be pickled.
        """
        packer, exporter = Packer(), Exporter(self.arena, inline_bytes, copy=copy)
        known = self.registered_code if by_digest and self.registered is not None else None
        encoder = Encoder(
            {torch.Tensor: packer.add, nn.Parameter: packer.add},
            nest_code=True,
            registered=lambda: known,
            reducers=REDUCERS,
        )
        try:
            body = encoder.encode(value)
        except Exception as error:
            raise NotShippableError(
                f"the {type(value).__qualname__} on worker {self.spec.name!r} cannot be pickled "
                f"({type(error).__name__}: {error}), so it stays there. Fetch a part of it, or "
                "run a function there that returns something plain."
            ) from error
        if not packer.tensors:
            return 0, body, exporter
        table = pickle.dumps(packer.table(exporter), protocol=5)
        return frames.HAS_TENSORS, table + body, exporter

    def adopt(self, tensor: torch.Tensor) -> None:
        """Put a tensor's storage into the arena, where nobody else uses that storage.

        A computed result is copied once then, and lent without a copy from then on. A storage
        that views or autograd share stays where it is: they would be left behind.
        """
        storage = tensor.untyped_storage()
        shared = self.arena.offset_of(storage.data_ptr()) is not None
        alone = torch._C._storage_Use_Count(storage._cdata) <= 2  # the tensor's and ours
        alone = alone and storage.resizable()  # else it is an array's memory
        if shared or not alone or storage.nbytes() == 0 or tensor.layout is not torch.strided:
            return
        stride = _dense(tensor)
        if stride is None:
            return
        block = self.arena.allocate(storage.nbytes())
        home = torch.from_numpy(self.arena.lease(block)).view(tensor.dtype)
        moved = torch.empty(0, dtype=tensor.dtype, device="cpu")
        moved.set_(home.untyped_storage(), 0, tensor.shape, stride)
        moved.copy_(tensor.detach())
        tensor.data = moved

    def reply(self, record: Any, sequence: int) -> int:
        """Queue a reply; its bytes."""
        body = pickle.dumps(tuple(record), protocol=5)
        self.channel.append(frames.pack(KIND[type(record)], frames.PLAIN, sequence, body))
        return len(body)

    # ---- other arenas

    def attach(self, name: str, size_bytes: int) -> None:
        """Map the arena whose descriptor waits on the side socket."""
        if size_bytes == 0:
            self.mapped.pop(name).close()
            return
        fd = receive_descriptor(self.side)
        try:
            self.map(name, fd, size_bytes)
        finally:
            os.close(fd)

    def map(self, name: str, fd: int, size_bytes: int) -> None:
        """Map the arena ``fd``; a restarted worker's replaces the old one."""
        old = self.mapped.pop(name, None)
        if old is not None:
            old.close()
        self.mapped[name] = Mapped(fd, size_bytes)

    def close(self) -> None:
        """Let go of everything."""
        self.store.clear()
        for exporter in self.exports.values():
            exporter.release()
        for mapped in self.mapped.values():
            mapped.close()
        self.arena.close()
        self.side.close()
        self.channel.close()


def _dense(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The stride, where the tensor is all there is in its storage."""
    whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return tensor.stride() if whole and tensor.storage_offset() == 0 else None


def _no_external(pid: int) -> Any:
    raise RuntimeError(f"a table of tensors refers to object {pid}")


def _nowhere(block: Any) -> Any:
    raise RuntimeError(f"{block} lies in an arena that is not attached")


def _note_process() -> None:
    Host.here = os.getpid()


os.register_at_fork(after_in_child=_note_process)
