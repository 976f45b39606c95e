"""Looks for a sequence of messages that breaks what the garbage collection promises (`greenroom.core.gc`).

`search` goes through every state of a small model, breadth first, so what it finds is the shortest way to it. `worker`
is the model of one worker and its control plane; `blobs` that of a snapshot store. All decisions in them are those that
are shipped; what a model adds is a network that loses, repeats and holds up messages without bound, processes that die,
and the promises. ``python -m greenroom.testing.collection`` searches further than the tests do.
"""
