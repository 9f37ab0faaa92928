"""The digest that a commit carries: the request's content key, every batch's place in order, and the first token.

Checksums stay out of it: each batch is verified against its own, and a batch that prefill recomputed after a
preemption may honestly differ in its last bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def commit_digest(
    request_digest: bytes, batches: Iterable[tuple[int, int, int, int]], first_token: int | None = None
) -> bytes:
    """16 bytes over the request's content key, each batch's ``(seq, first_block, blocks, nbytes)`` in order, and the
    first token if the commit names it."""
    state = hashlib.blake2b(request_digest, digest_size=16, person=b"pdt-commit")
    for batch in batches:
        for number in batch:
            state.update(number.to_bytes(8, "little"))
    if first_token is not None:
        state.update(first_token.to_bytes(4, "little"))  # 4 bytes: no batch looks like it
    return state.digest()
