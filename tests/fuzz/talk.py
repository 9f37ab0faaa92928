"""What peers say: each message, and what fits the transfer that the target ``wire`` has open, from both sides."""

from __future__ import annotations

from typing import Any

import msgpack

from pdtransport.protocol.messages import PROTOCOL_VERSION, encode
from tests.fuzz.peers import BLOCK_BYTES, BLOCK_TOKENS, BLOCKS, DIGEST, GENERATION, GROUPS, TRANSFER
from tests.fuzz.split import SEPARATOR
from tests.unit.test_protocol_messages import EXAMPLES

__all__ = ["CONVERSATION", "FRAMES", "SEPARATOR"]

_ABOUT = {"v": PROTOCOL_VERSION, "transfer": TRANSFER, "generation": GENERATION}
_TOKENS = BLOCKS * BLOCK_TOKENS
_GROUPS = {"groups": [[0, BLOCKS, 0, 4]] * GROUPS}
_WORDS: list[dict[str, Any]] = [
    {"kind": "accept", "known": True, "tokens_done": 16},
    *(
        {"kind": "batch", "seq": group, "attempt": 0, "group": group, "first_block": 0, "blocks": BLOCKS}
        | {"nbytes": BLOCKS * BLOCK_BYTES, "checksums": bytes(8 * BLOCKS), "offer": bytes(9)}
        for group in range(GROUPS)
    ),
    {"kind": "commit", "batches": GROUPS, "tokens": _TOKENS, "digest": DIGEST},
    {"kind": "abort", "code": "timeout", "reason": ""},
    {"kind": "grant", **_GROUPS, "tokens": _TOKENS, "prompt_digest": DIGEST, "window_bytes": 1 << 20, "consumers": 1},
    {"kind": "received", "seqs": [0]},
    {"kind": "nack", "wants": [[0, 1]], "reason": ""},
    {"kind": "ack"},
    {"kind": "revoke", "code": "cancelled", "reason": ""},
]
FRAMES = [encode(message) for message in EXAMPLES]
CONVERSATION: list[bytes] = [msgpack.packb({**_ABOUT, **each}) for each in _WORDS]
