"""Deterministic simulation of the hand-off: seeded schedules of engines and faults, checked after every event."""
