"""The real engine, several replicas of it, in a simulated world: workers, store, network and clients, all on one
`greenroom.testing.simloop.SimLoop`, all decided by one seed.

    python -m greenroom.testing.simulation --seeds 1000         looks for a seed that breaks something
    python -m greenroom.testing.simulation --from 17 --trace    shows what happens with seed 17

What is real: `greenroom.engine`, `greenroom.core`, `greenroom.store.memory`, and of the agent what decides: its fence
and its watch for being alone. What is a model: the network (`network`, `links`), how a replica sees the store
(`database`) and the snapshot store (`snapshots`), workers (`agent`, `calls`, `machine`), people (`clients`).

`plan` draws how large a world is and what goes wrong in it, `faults` and `trouble` do that, `oracle` and `bookkeeping`
see what must never be, `rest` what must not last. `world` puts it together, `run` runs it. `script` lets one step after
the other of an actor's life go wrong, instead of what the seed draws.
"""
