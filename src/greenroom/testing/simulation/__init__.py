"""The real engine, several replicas of it, in a simulated world: workers, store, network and clients, all on one
`greenroom.testing.simloop.SimLoop`, all decided by one seed.

    python -m greenroom.testing.simulation --seeds 1000         looks for a seed that breaks something
    python -m greenroom.testing.simulation --from 17 --trace    shows what happens with seed 17

What is real: `greenroom.engine`, `greenroom.core`, `greenroom.store.memory`, `greenroom.agent.fence`. What is a model:
the network (`network`), how a replica sees the store (`database`), workers and their sandboxes (`machine`, `agent`),
the snapshot store (`snapshots`), people (`clients`). What goes wrong is in `faults` and `trouble`, what must hold all
the same in `oracle`, and `run` puts it together.
"""
