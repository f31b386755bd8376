"""What a client does in secure aggregation: four steps, each once, and what it refuses.

Runs in worker processes; nothing here knows of workers. Bonawitz et al., "Practical Secure
Aggregation for Privacy-Preserving Machine Learning", CCS 2017, figure 4, for a server that
follows the protocol and remembers everything (semi-honest). In its words: U1, U2, U3 are the
clients that finished the first, second and third step; t is the threshold; u is this client.

A masked vector is ``y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)`` modulo
2**64. In the sum over U3 the pairwise masks of survivors cancel. What is left is taken away by
the server: it rebuilds b_u of each survivor, and the masking key of each client that dropped out,
from t shares. Both of one client would lay its vector bare; so nobody releases both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fedproc.client import masking, shamir
from fedproc.errors import NotPermittedError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from fedproc.client.masking import Words


@dataclass(frozen=True, slots=True)
class Setup:
    """What all parties of one sum know from the start.

    Attributes:
        context: Bytes that no other sum has; they go into every key.
        cohort: The clients; the order decides the signs of the masks and the points of shares.
        threshold: How many clients must be left after every step; at least 2.
    """

    context: bytes
    cohort: tuple[str, ...]
    threshold: int

    def points(self) -> dict[str, int]:
        """Maps clients to the points of their shares, from 1."""
        return {client: place for place, client in enumerate(self.cohort, 1)}


class PublicKeys(NamedTuple):
    """What a client advertises: X25519 public keys, 32 bytes each.

    Attributes:
        sealing: For the encryption of shares (c_u in the paper).
        masking: For the pairwise masks (s_u).
    """

    sealing: bytes
    masking: bytes


class Released(NamedTuple):
    """The shares a client gives to the server in the end; no client is in both.

    Attributes:
        self_masks: Survivor -> share of its b.
        masking_keys: Client that dropped out -> share of its private masking key.
    """

    self_masks: dict[str, bytes]
    masking_keys: dict[str, bytes]


def mask_purpose(setup: Setup) -> bytes:
    """Returns the purpose of the keys of pairwise masks."""
    return b"fedproc secure aggregation: mask " + setup.context


class SecureClient:
    """One client in one sum; its keys are fresh and end with it."""

    def __init__(self, name: str, setup: Setup) -> None:
        """Draws the keys.

        Raises:
            NotPermittedError: A threshold below 2 would let a sum be the vector of one client.
        """
        if setup.threshold < 2:
            raise NotPermittedError(f"client {name!r} refuses a threshold below 2: a sum of one")
        self._name, self._setup = name, setup
        self._points = setup.points()
        sealing, self._masking_secret, self._self_mask = (
            os.urandom(masking.KEY_BYTES) for _ in range(3)
        )
        self._sealing = masking.private_key(sealing)
        self._masking = masking.private_key(self._masking_secret)
        self._keys: dict[str, PublicKeys] = {}
        self._opening: dict[str, bytes] = {}
        self._sealed: dict[str, bytes] = {}
        self._own_shares = b""
        self._done = ""

    def advertise_keys(self) -> PublicKeys:
        """Step 0: makes the public keys."""
        self._step("", "advertise keys")
        return PublicKeys(masking.public_key(self._sealing), masking.public_key(self._masking))

    def share_keys(self, keys: Mapping[str, PublicKeys]) -> dict[str, bytes]:
        """Step 1: splits b_u and the masking key, and seals each share for its holder.

        Args:
            keys: What the clients of U1 advertised.

        Returns:
            Other client of U1 -> what only it can open.

        Raises:
            NotPermittedError: U1 is too small, or has a key twice.
        """
        self._step("advertise keys", "share keys")
        self._require(keys, self._setup.cohort, "keys")
        public = [key for pair in keys.values() for key in pair]
        if len(set(public)) < len(public):
            raise NotPermittedError(f"client {self._name!r} refuses: a public key comes twice")
        self._keys = dict(keys)
        of_mask, of_key = (
            shamir.split(secret, self._setup.threshold, len(self._points))
            for secret in (self._self_mask, self._masking_secret)
        )
        shares = {v: of_mask[self._points[v] - 1] + of_key[self._points[v] - 1] for v in keys}
        self._own_shares = shares.pop(self._name)
        return {v: masking.seal(self._sealing_key(v), shares[v]) for v in shares}

    def mask(self, words: Words, sealed: Mapping[str, bytes]) -> None:
        """Step 2: masks the vector in place.

        Args:
            words: The vector in fixed point: uint64, shape (n,).
            sealed: Other client of U2 -> what it sealed for this one.

        Raises:
            NotPermittedError: U2 is too small, or has others than U1; ``words`` is unchanged.
        """
        self._step("share keys", "mask")
        self._require([self._name, *sealed], self._keys, "shares")
        self._sealed = dict(sealed)
        masking.add_mask(words, self._self_mask)
        purpose = mask_purpose(self._setup)
        for v in sealed:
            (key,) = masking.agree(self._masking, self._keys[v].masking, purpose)
            masking.add_mask(words, key, subtract=self._points[v] < self._points[self._name])

    def unmask(self, survivors: Collection[str]) -> Released:
        """Step 3: opens what the others sealed and releases one share of each.

        Args:
            survivors: U3, whose masked vectors were summed.

        Raises:
            NotPermittedError: U3 is too small, has others than U2, or lacks this client; or a
                share was changed. A second question is refused, whatever it asks for.
        """
        self._step("mask", "unmask")
        self._require(survivors, [self._name, *self._sealed], "survivors")
        released = Released({}, {})
        for v in (self._name, *self._sealed):
            share = self._own_shares if v == self._name else self._open(v)
            if v in survivors:
                released.self_masks[v] = share[: shamir.SHARE_BYTES]
            else:
                released.masking_keys[v] = share[shamir.SHARE_BYTES :]
        return released

    def _step(self, after: str, step: str) -> None:
        """Notes that ``step`` was taken, also if it fails: every step is taken once, in order."""
        if self._done != after:
            done = f"after {self._done!r}" if self._done else "first"
            raise NotPermittedError(f"client {self._name!r} refuses the step {step!r} {done}")
        self._done = step

    def _require(self, found: Collection[str], known: Collection[str], what: str) -> None:
        """Refuses a set of clients that is too small, lacks this one, or has strangers."""
        why = None
        if len(found) < self._setup.threshold:
            why = f"{len(found)} {what}, the threshold is {self._setup.threshold}"
        elif self._name not in found:
            why = f"it is not among the {what}"
        elif not set(found) <= set(known):
            why = f"{what} of clients that did not take the step before"
        if why is not None:
            raise NotPermittedError(f"client {self._name!r} refuses: {why}")

    def _sealing_key(self, receiver: str) -> bytes:
        """Returns the key of the one message to another client; notes that of the one from it."""
        purpose = b"fedproc secure aggregation: shares " + self._setup.context
        up, down = masking.agree(self._sealing, self._keys[receiver].sealing, purpose, keys=2)
        later = self._points[receiver] > self._points[self._name]
        to, self._opening[receiver] = (up, down) if later else (down, up)
        return to

    def _open(self, sender: str) -> bytes:
        return masking.unseal(self._opening[sender], self._sealed[sender])
