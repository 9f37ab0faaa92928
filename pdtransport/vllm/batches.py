"""Several requests of vLLM's engine that came in one body, under one ``kv_transfer_params``.

A batch of prompts becomes one request each, ``cmpl-ID-0``, ``cmpl-ID-1``, ... with eight random digits behind; ``n``
answers to one prompt become ``0_cmpl-...``, ``1_cmpl-...``. A transfer carries one prompt's pages to one sequence. So
each prompt of a batch has a transfer of its own, named on both sides after its place in the batch; and of ``n``
sequences the first has it, while the others are computed here. Were a place ever read wrongly, the content keys would
differ, and nothing be used.
"""

from __future__ import annotations

import re
from collections import OrderedDict

from pdtransport.protocol.messages import MAX_TRANSFER_ID

MAX_MINTED = 4096  # batches remembered
_PLACE = re.compile(r"(?P<body>cmpl-.*)-(?P<prompt>[0-9]{1,5})(-[0-9a-f]{8})?", re.DOTALL)
_SEQUENCE = re.compile(r"(?P<sequence>[0-9]{1,5})_(chat)?cmpl-.*", re.DOTALL)


class Batches:
    """Gives each request of a body its own transfer."""

    def __init__(self) -> None:
        self._minted: OrderedDict[str, str] = OrderedDict()  # of bodies that named none

    def transfer(self, request_id: str, transfer: str, *, minted: bool) -> tuple[str, str]:
        """The request's transfer, where its body has ``transfer``; or why it has none. ``minted``: the body named none,
        and this is a fresh one: the prompts of a batch share the first one's, which the answer tells."""
        sequence, place = _SEQUENCE.fullmatch(request_id), _PLACE.fullmatch(request_id)
        if sequence is not None and int(sequence["sequence"]):
            return "", "of several sequences (n) the first is, the others are computed here"
        if place is None:
            return transfer, ""
        prompt = int(place["prompt"])
        if minted:
            transfer = self._shared(place["body"], transfer, prompt)
        name = f"{transfer}.{prompt}" if prompt else transfer
        if len(name) > MAX_TRANSFER_ID:
            return "", f"transfer_id is too long to name each prompt of a batch ({MAX_TRANSFER_ID} characters)"
        return name, ""

    def _shared(self, body: str, fresh: str, prompt: int) -> str:
        if prompt and body in self._minted:
            return self._minted[body]
        self._minted[body] = fresh
        self._minted.move_to_end(body)
        while len(self._minted) > MAX_MINTED:
            self._minted.popitem(last=False)
        return fresh
