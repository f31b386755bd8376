"""What the server does in secure aggregation: it relays, adds, and takes the masks away.

Runs in the parent. The server's side of Bonawitz et al. 2017, figure 4; the clients' side, and
its words, are in :mod:`fedproc.client.secure`. After every step at least ``threshold`` clients
must be left; with fewer the sum stays masked for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fedproc.client import masking, shamir
from fedproc.client.secure import PublicKeys, Released, Setup, mask_purpose
from fedproc.errors import QuorumError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from fedproc.client.masking import Words


class SecureSum:
    """One sum of masked vectors, from the keys to the integers.

    Attributes:
        setup: What the clients know, too.
        keys: Client of U1 -> its public keys.
        survivors: U3: the clients whose vectors were added, in the order of adding.
    """

    def __init__(self, setup: Setup, numel: int) -> None:
        """Starts a sum of vectors of ``numel`` words."""
        self.setup = setup
        self.keys: dict[str, PublicKeys] = {}
        self.survivors: list[str] = []
        self._sealed: Mapping[str, Mapping[str, bytes]] = {}
        self._words: Words = np.zeros(numel, dtype=np.uint64)

    def take_keys(self, keys: Mapping[str, PublicKeys]) -> None:
        """Step 0: notes U1, the clients that advertised keys.

        Raises:
            QuorumError: They are too few, as in every step below.
        """
        self._require(keys, "advertised keys")
        self.keys = dict(keys)

    def take_shares(self, sealed: Mapping[str, Mapping[str, bytes]]) -> None:
        """Step 1: notes U2, the clients that shared keys: sender -> receiver -> sealed shares."""
        self._require(sealed, "shared keys")
        self._sealed = sealed

    @property
    def sharing(self) -> tuple[str, ...]:
        """U2, in cohort order."""
        return tuple(client for client in self.setup.cohort if client in self._sealed)

    def sealed_for(self, client: str) -> dict[str, bytes]:
        """Returns what the others of U2 sealed for a client."""
        return {sender: box[client] for sender, box in self._sealed.items() if sender != client}

    def add(self, client: str, masked: Tensor) -> None:
        """Step 2: adds a masked vector (int64, shape (numel,)); the order does not matter."""
        self._words += masked.numpy().view(np.uint64)
        self.survivors.append(client)

    def require_survivors(self) -> None:
        """Makes sure that unmasking may begin; clients refuse to take part otherwise."""
        self._require(self.survivors, "sent a masked update")

    def unmask(self, answers: Mapping[str, Released]) -> Tensor:
        """Step 3: takes all masks away.

        Args:
            answers: Client of U3 -> the shares it released.

        Returns:
            The sum over U3: int64, shape (numel,). The server keeps nothing of it.

        Raises:
            QuorumError: Too few answered.
            ValueError: Shares do not fit together: somebody did not follow the protocol.
        """
        self._require(answers, "released shares")
        for client in self.survivors:
            self_mask = self._rebuild(client, {u: a.self_masks for u, a in answers.items()})
            masking.add_mask(self._words, self_mask, subtract=True)
        for client in self._sealed.keys() - set(self.survivors):
            self._remove_pairs(client, {u: a.masking_keys for u, a in answers.items()})
        return torch.from_numpy(self._words.view(np.int64))

    def _rebuild(self, client: str, shares: Mapping[str, Mapping[str, bytes]]) -> bytes:
        points = self.setup.points()
        known = {points[u]: found[client] for u, found in shares.items() if client in found}
        return shamir.combine(known, self.setup.threshold)

    def _remove_pairs(self, dropped: str, shares: Mapping[str, Mapping[str, bytes]]) -> None:
        """Takes away the masks that survivors share with a client that dropped out."""
        private = masking.private_key(self._rebuild(dropped, shares))
        if masking.public_key(private) != self.keys[dropped].masking:
            raise ValueError(f"the shares of client {dropped!r} do not give its masking key")
        points, purpose = self.setup.points(), mask_purpose(self.setup)
        for u in self.survivors:
            (key,) = masking.agree(private, self.keys[u].masking, purpose)
            # the survivor added it if the other one came later, and subtracted it otherwise
            masking.add_mask(self._words, key, subtract=points[dropped] > points[u])

    def _require(self, clients: Collection[str], did: str) -> None:
        if len(clients) < self.setup.threshold:
            raise QuorumError(
                f"{len(clients)} of {len(self.setup.cohort)} clients {did}, "
                f"{self.setup.threshold} are needed; nothing was unmasked"
            )
