"""Assigns transfers to the engine requests that vLLM makes from one HTTP body with one ``kv_transfer_params``.

vLLM splits a batch of prompts into requests ``cmpl-ID-0``, ``cmpl-ID-1``, ... (plus eight random hex digits), and ``n``
answers to one prompt into ``0_cmpl-...``, ``1_cmpl-...``. A transfer carries one prompt's pages to one sequence. So
each prompt of a batch gets its own transfer, named on both sides after its index in the batch. Of ``n`` sequences only
the first gets the transfer; decode computes the others. If an index were ever parsed wrongly, the prompt digests would
differ and the pages would not be used.
"""

from __future__ import annotations

import re
from collections import OrderedDict

from pdtransport.protocol.messages import MAX_TRANSFER_ID

MAX_MINTED = 4096  # bodies without a transfer id that are remembered
_PLACE = re.compile(r"(?P<body>cmpl-.*)-(?P<prompt>[0-9]{1,5})(-[0-9a-f]{8})?", re.DOTALL)
_SEQUENCE = re.compile(r"(?P<sequence>[0-9]{1,5})_(chat)?cmpl-.*", re.DOTALL)


class Batches:
    """Assigns each request of a body its own transfer."""

    def __init__(self) -> None:
        self._minted: OrderedDict[str, str] = OrderedDict()  # body -> transfer id, for bodies without one

    def transfer(self, request_id: str, transfer: str, *, minted: bool) -> tuple[str, str]:
        """The transfer of one request.

        Args:
            transfer: transfer id of the body.
            minted: the body had no transfer id, and ``transfer`` was made for this request. All prompts of a batch then
                use the id made for the first one, which the response contains.

        Returns:
            The transfer id and an empty string, or an empty string and the reason why there is none.
        """
        sequence, place = _SEQUENCE.fullmatch(request_id), _PLACE.fullmatch(request_id)
        if sequence is not None and int(sequence["sequence"]):
            return "", "of several sequences (n) only the first is handed over, the others are computed here"
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
