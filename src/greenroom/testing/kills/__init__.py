"""``kill -9`` of agents, of the control plane and of both, at random moments while actors come and go; and after each,
whether anything leaks and whether anything alive was touched. `rounds.Rounds` runs it, `load` is what goes on
meanwhile.

    python bench/gc_kill.py --rounds 200 --seed 1
"""
