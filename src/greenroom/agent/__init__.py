"""The worker: one process that runs actors in sandboxes of one backend and answers one control plane, by a link to each
of its replicas.

`agent` is the core (transport-free, no word of any backend), `fence` decides which calls it carries out, `journal` is
what it remembers, `alone` when nothing may run; `waking`, `sleeping`, `residents`, `staging` and `held` are its parts;
`links` and `link` are how it is reached.
"""
