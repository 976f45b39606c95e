"""The slot ledger: how the workers of a pool stay right when the view of the cluster is stale. Pure.

A controller that compares "pods wanted" with "pods seen" creates too many as soon as its view lags, and then deletes
healthy ones. Here each worker is a *slot* of a ledger that is kept in the pool's own object and changed by
compare-and-swap: first a slot is reserved, then the pod of that slot is created, under a name that only this slot ever
has. What was reserved counts, whether it is seen or not. So correctness never depends on what a process remembers nor
on how fresh a cache is; both only decide when something is tried.

    records.py    slots, ledgers, what is wanted, what is seen, what is to be done
    naming.py     names of pods, and back
    wire.py       a ledger in a pool's status, and whether it is whole
    notes.py      what a process remembers; losing it costs time only
    decide.py     what is seen and wanted -> the next ledger
    effects.py    a committed ledger -> what is to be done in the cluster
"""
