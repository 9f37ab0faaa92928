"""Hand a prompt's KV pages over, with asyncio: `python examples/handover_async.py`.

Both ends are in one process here, to be short; `handover.py` has them in two.
"""

import asyncio
import secrets

import numpy as np

from pdtransport import KVGeometry, Transport, prompt_digest

PROMPT = list(range(1000))  # token ids
PAGES = list(range(63))  # of 16 tokens each


async def main() -> None:
    # [layers, blocks, heads, tokens, bytes of K and V]: numpy's, torch's, or any with DLPack, on the host or a GPU
    computed = np.random.default_rng(0).integers(0, 256, (8, 64, 4, 16, 128), dtype=np.uint8)
    received = np.zeros_like(computed)
    transfer, digest = secrets.token_hex(16), prompt_digest(PROMPT)
    async with (
        Transport(KVGeometry.of_array(computed), port=0) as prefill,
        Transport(KVGeometry.of_array(received), port=0) as decode,
    ):
        receipt = decode.receive(transfer, digest, len(PROMPT), PAGES, host=prefill.host, port=prefill.port)
        offer = prefill.offer(transfer, digest, len(PROMPT))
        offer.ready(PAGES[:16], tokens=256)  # pages leave as they are computed
        offer.ready(PAGES, tokens=1000)
        offer.finish()
        print(await receipt, "same bytes:", (received[:, PAGES] == computed[:, PAGES]).all())


asyncio.run(main())
