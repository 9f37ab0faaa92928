"""Deterministic simulation of the hand-off: seeded schedules of engines, links and faults, checked after every event."""
