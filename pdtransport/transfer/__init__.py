"""Runs transfers: drives the protocol's state machines with real control channels and links."""
