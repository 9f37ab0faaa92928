"""One transfer, from the offer to the acknowledgement: the protocol's drivers, and the link of each pair of peers."""
