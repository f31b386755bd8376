"""A peer: a script that is asked for one measurement at a time, so that runs can be paired.

It runs with this interpreter, in a process of its own, and answers in lines of JSON. A peer that is
not installed, or does not run here, says so once and is left out, by name.
"""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from benchmarks.measure import ROOT

Measures = dict[str, Callable[..., Any]]


class Peer:
    """This side: asks."""

    def __init__(self, module: str, *arguments: str) -> None:
        """Start ``benchmarks.peers.<module>``; ``missing`` tells why it cannot be measured."""
        command = [sys.executable, "-m", f"benchmarks.peers.{module}", *arguments]
        pipe = subprocess.PIPE
        self.name = module
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, cwd=ROOT, text=True
        )
        told = self._answer()
        self.version: str | None = told.get("version")
        self.missing: str | None = told.get("missing")

    def ask(self, what: str, **arguments: Any) -> Any:
        """The number (or JSON value) it measures.

        Raises:
            RuntimeError: it failed.
        """
        assert self._process.stdin is not None
        print(json.dumps([what, arguments]), file=self._process.stdin, flush=True)
        told = self._answer()
        if "failed" in told:
            raise RuntimeError(f"{self.name}: {told['failed']}")
        return told["value"]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """It and its processes stand still: those of torch.distributed.rpc never sleep."""
        parent = psutil.Process(self._process.pid)
        family = [parent, *parent.children(recursive=True)]
        for process in family:
            process.suspend()
        try:
            yield
        finally:
            for process in family:
                process.resume()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"missing": "it ended", "failed": "it ended"}

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(
    package: str, measures: Callable[[], "contextlib.AbstractContextManager[Measures]"]
) -> None:
    """The other side: set up, then measure what is asked for until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peer prints is no answer

    def tell(**told: Any) -> None:
        print(json.dumps(told), file=answers, flush=True)

    try:
        version = importlib.metadata.version(package)
        with measures() as table:
            tell(version=version)
            for line in sys.stdin:
                what, arguments = json.loads(line)
                try:
                    tell(value=table[what](**arguments))
                except Exception as error:  # noqa: BLE001 - told to whoever asks
                    tell(failed=f"{type(error).__name__}: {error}")
    except importlib.metadata.PackageNotFoundError:
        tell(missing=f"{package} is not installed (extra: bench)")
    except Exception as error:  # noqa: BLE001 - told to whoever asks
        tell(missing=f"{package} does not run here: {type(error).__name__}: {error}")


@contextlib.contextmanager
def peers(*modules: str) -> Iterator[list[Peer]]:
    """Those of these peers that run here; the others are named on standard error."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(contextlib.closing(Peer(module))) for module in modules]
        for peer in found:
            if peer.missing is not None:
                print(f"{peer.name}: {peer.missing}", file=sys.stderr)
        yield [peer for peer in found if peer.missing is None]
