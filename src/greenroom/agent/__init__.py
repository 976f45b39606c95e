"""The worker: one process that runs actors in sandboxes of one backend and answers one control plane.

`agent` is the core (transport-free, no word of any backend), `journal` what it remembers, `link` how it is reached.
"""
