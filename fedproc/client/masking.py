"""The primitives of secure aggregation: key agreement, authenticated encryption, mask streams.

Runs in workers and in the parent. Everything cryptographic is the ``cryptography`` package's:
X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), AES-256-GCM for what the parent relays, and AES-256 in
counter mode as the pseudorandom generator of the masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedproc.errors import NotPermittedError

if TYPE_CHECKING:
    import numpy.typing as npt

    Words = npt.NDArray[np.uint64]
    """Numbers modulo 2**64: numpy's unsigned addition wraps, which is what a mask needs."""

KEY_BYTES: Final = 32
# The stream is made and added piece by piece, so that a piece stays in the processor's cache.
_PIECE_BYTES: Final = 1 << 18
_ZEROS: Final = bytes(_PIECE_BYTES)
_BLOCK_BYTES: Final = 16
# A key is used for one message or one stream and never again, so the nonce need not vary.
_NONCE: Final = bytes(12)
_COUNTER: Final = bytes(_BLOCK_BYTES)


def private_key(secret: bytes) -> X25519PrivateKey:
    """Makes a private key of 32 random bytes; it costs as much as an agreement, so keep it."""
    return X25519PrivateKey.from_private_bytes(secret)


def public_key(private: X25519PrivateKey) -> bytes:
    """Returns the public key (32 bytes) of a private key."""
    return private.public_key().public_bytes_raw()


def agree(private: X25519PrivateKey, public: bytes, purpose: bytes, keys: int = 1) -> list[bytes]:
    """Returns the keys of 32 bytes that two parties share, each with the other's public key.

    Args:
        private: One's own private key.
        public: The other's public key.
        purpose: What the keys are for; other purposes give unrelated keys.
        keys: How many.
    """
    secret = private.exchange(X25519PublicKey.from_public_bytes(public))
    stream = HKDF(hashes.SHA256(), keys * KEY_BYTES, None, purpose).derive(secret)
    return [stream[place : place + KEY_BYTES] for place in range(0, len(stream), KEY_BYTES)]


def seal(key: bytes, message: bytes) -> bytes:
    """Encrypts and authenticates the only message that ``key`` is ever used for."""
    return AESGCM(key).encrypt(_NONCE, message, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """Returns the message of :func:`seal`.

    Raises:
        NotPermittedError: It was changed on its way, or is meant for somebody else.
    """
    try:
        return AESGCM(key).decrypt(_NONCE, sealed, None)
    except InvalidTag:
        raise NotPermittedError("a sealed message was changed or is not for this client") from None


def add_mask(words: Words, key: bytes, *, subtract: bool = False) -> None:
    """Adds the stream of ``key`` to ``words`` modulo 2**64, in place.

    Args:
        words: uint64, shape (n,), contiguous.
        key: 32 bytes, used for no other stream.
        subtract: Take the stream away instead, which undoes an addition.
    """
    stream: Any = Cipher(algorithms.AES(key), modes.CTR(_COUNTER)).encryptor()
    piece = np.empty(_PIECE_BYTES + _BLOCK_BYTES, dtype=np.uint8)
    change = np.subtract if subtract else np.add
    for start in range(0, len(words), _PIECE_BYTES // 8):
        part = words[start : start + _PIECE_BYTES // 8]
        stream.update_into(memoryview(_ZEROS)[: part.nbytes], piece)
        change(part, piece[: part.nbytes].view("<u8"), out=part)
