"""Deterministic simulation of the hand-off: the real engines, drivers and peers of transfers, under seeded schedules of
servers and faults, checked after every event."""
