"""Real vLLM servers for tests and benchmarks: start them, talk to them, watch them, and leave nothing behind.

``servers`` starts and stops them, ``client`` sends requests (plain, and disaggregated in both dispatch orders),
``prompts`` makes token-id prompts of real text, ``answers`` knows what a plain server says to them, ``watch`` reads
metrics, worker status and resource use, ``audit`` compares the bytes of pages on both sides.
"""
