"""Bugs made on purpose, and which tests find them: ``python -m tests.mutants`` (``make mutants``).

``listed`` is the list; its bugs are replacements in the source of one symbol, made while a process of their own imports
the module: no file changes. Rules of the protocol that the simulator must find stand in ``tests/sim/mutants.py``, bugs
that only real processes can show in ``tests/faults/mutants.py``; the one command runs and counts all three.
"""
