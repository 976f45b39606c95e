"""Pure core: records, the state table, errors and decisions.

Nothing in this package awaits, sleeps, reads a clock, draws randomness or makes an id. A decision takes
records and ``now`` and returns new records and effects; the shells above it act.
"""
