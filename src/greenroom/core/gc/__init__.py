"""Garbage collection: the control plane marks, each worker sweeps its own slice and reports.

A *resource* is anything that a worker makes on its machine for the control plane. Its row in the database says what
should be; an *entry* in the worker's table says what is. These modules decide, for both sides, what a difference means.
No clock is in any of it: numbers that the control plane gives out decide what absence means, so a message may be lost,
repeated or overtaken by any number of others.

The numbers. A worker's *incarnation* is random and lies on its state disk: another disk, another incarnation. Its
*epoch* grows with every registration, also from one incarnation to the next. Its *seq* grows with every resource that
is meant for it, and never goes back. A handle is never given out twice.

The rules (`control` has the control plane's, `worker` the worker's):

1. *Intent first.* The row of a resource, CREATING and numbered, is committed before the worker is asked to make it.
2. *The worker closes.* It carries out a create only in its own epoch, only with a number above its ``closed_seq``, and
   only once. Before the first side effect it writes down an INIT entry. Whatever it has an entry of, INIT, LIVE or
   DYING, is in its inventory.
3. *Sync.* A report is an inventory together with the ``closed_seq`` that was adopted before it was taken. Nothing with
   that number or a lower one can appear on that disk any more, so what is missing there is missing for ever: its row
   goes. What has a higher number may still come: nothing follows from its absence. A listing that failed or is partial
   is no inventory; it is a sign of life.
4. *What nobody speaks of goes.* An entry without a row is destroyed, because the row was there first and has been
   removed. Unless its number was never given out: then the database has gone back in time, and nothing on that worker
   is destroyed or forgotten until somebody has looked (`control.acknowledge`).
5. *Abandon.* A CREATING row whose operation has died becomes DESTROYING. That lets ``closed_seq`` grow past it, which
   refuses the create should it come yet. CREATING rows are never removed because of their absence.
6. *Register.* All rows that are CREATING become DESTROYING and everything given out so far is closed. A new incarnation
   has nothing of the old one: its rows go. An old incarnation that turns up again is told to wipe itself.
7. *Destroying is for ever.* Nothing leaves DESTROYING but by removal, so whoever is told to destroy may do so whenever
   the message comes. Children go before parents.
8. *Silence means nothing.* No row goes because of a time that has passed; a worker that nobody hears keeps them all,
   until somebody says that it is gone (`control.gone`).

`blobs` has the rules of the snapshot store's objects, which no worker owns. `greenroom.testing.collection` searches all
of it for a sequence of messages that breaks a promise.
"""
