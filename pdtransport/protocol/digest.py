"""The digest in a Commit: over the prompt's digest, the place of every batch, and the first token.

Checksums are not part of it: each batch is verified against its own, and a batch that prefill recomputed after a
preemption may legitimately differ in its last bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def commit_digest(
    prompt_digest: bytes, batches: Iterable[tuple[int, int, int, int, int]], first_token: int | None = None
) -> bytes:
    """Digest of a commit, 16 bytes.

    Covers the prompt's digest, ``(seq, group, first_block, blocks, nbytes)`` of each batch in order, and the first
    token if the commit names it.
    """
    state = hashlib.blake2b(prompt_digest, digest_size=16, person=b"pdt-commit")
    for batch in batches:
        for number in batch:
            state.update(number.to_bytes(8, "little"))
    if first_token is not None:
        state.update(first_token.to_bytes(4, "little"))  # 4 bytes: can't be mistaken for a batch, which has 40
    return state.digest()
