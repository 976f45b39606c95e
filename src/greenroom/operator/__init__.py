"""The Kubernetes operator: keeps the worker pods that pools ask for.

    kubeconfig.py  where the API server is, and who we are there
    transport.py   port: requests and their answers; over HTTP
    client.py      the few calls that are made, and what their answers mean
    objects.py     objects of the API as far as they are read
    reflector.py   a cache that follows the server
    queue.py       what is to be looked at, each thing by one task at a time
    election.py    who of several operators acts
    worker_pod.py  how a worker's pod is made
    status.py      conditions and counts of a pool
    actuator.py    effects of the ledger -> calls
    keeper.py      one pool: get, decide, commit, act
    operator.py    all of it together
    specs.py       what the custom resources hold; crds.py: their definitions

What a pool's workers are is decided by `greenroom.core.ledger`, from what is read here; nothing here decides that.
"""
