"""Worker pools in virtual time: the real operator against the fake API server, which does its worst.

transport.py   the operator's requests, in a simulated process, to a simulated server
world.py       server, nodes, operators, people and trouble; one seed, one course
oracle.py      what must hold, checked on the server's log and on nothing that an operator believes
losers.py      how others count pods; the world is only trusted while these fail in it
"""
