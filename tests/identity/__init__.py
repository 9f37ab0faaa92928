"""Is KV taken for equal by content, whatever it is called? Random pairs of servers, adapters and labels, real vLLM."""
