"""Two plain processes hand KV pages over, without an engine: `python examples/handover.py`.

The prefill process computes a prompt chunk by chunk and offers its pages as they are done; the decode process grants
other pages of its own, and knows, once the receipt is in, that they hold the same bytes.
"""

import multiprocessing as mp
import secrets

import numpy as np

from pdtransport import KVGeometry, Transport, prompt_digest

LAYERS, BLOCKS, HEADS, BLOCK_SIZE, SLOT = 8, 64, 4, 16, 128  # bytes of K and V of one head of one token
PROMPT = list(range(1000))  # token ids
DIGEST = prompt_digest(PROMPT)


def kv_cache() -> np.ndarray:
    return np.zeros((LAYERS, BLOCKS, HEADS, BLOCK_SIZE, SLOT), dtype=np.uint8)


def prefill(transfer: str, ports: mp.Queue, expected: mp.Queue) -> None:
    kv = kv_cache()
    pages = list(range(63))
    with Transport(KVGeometry.of_array(kv), port=0) as transport:
        ports.put(transport.port)
        offer = transport.offer(transfer, DIGEST, tokens=len(PROMPT))
        for done in range(0, len(PROMPT), 256):  # "computes" 256 tokens a step
            first, last = done // BLOCK_SIZE, min(done + 256, len(PROMPT) + BLOCK_SIZE - 1) // BLOCK_SIZE
            kv[:, first:last] = np.random.default_rng(done).integers(0, 256, kv[:, first:last].shape, dtype=np.uint8)
            offer.ready(pages, tokens=min(done + 256, len(PROMPT)))
        expected.put(kv[:, pages].tobytes())
        offer.finish()
        print("prefill:", offer.result(timeout_s=30))


def decode(transfer: str, port: int, expected: mp.Queue) -> None:
    kv = kv_cache()
    pages = list(reversed(range(63)))  # its own pages, in its own order
    with Transport(KVGeometry.of_array(kv), port=0) as transport:
        receipt = transport.receive(transfer, DIGEST, len(PROMPT), pages, host="127.0.0.1", port=port)
        print("decode: ", receipt.result(timeout_s=30))
        print("same bytes:", kv[:, pages].tobytes() == expected.get(timeout=30))
        print("link:", transport.status()["peers"][0]["why"])


if __name__ == "__main__":
    mp.set_start_method("spawn")
    ports, expected, transfer = mp.Queue(), mp.Queue(), secrets.token_hex(16)
    prefiller = mp.Process(target=prefill, args=(transfer, ports, expected))
    prefiller.start()
    decode(transfer, ports.get(timeout=30), expected)
    prefiller.join(timeout=30)
