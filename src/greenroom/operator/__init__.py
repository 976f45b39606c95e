"""The Kubernetes operator: keeps the worker pods that pools ask for, and what goes along with them.

    kubeconfig.py  where the API server is, and who we are there
    transport.py   port: requests and their answers; over HTTP
    portforward.py a way to a port of a pod, for who is outside the cluster
    client.py      the few calls that are made, and what their answers mean
    objects.py     objects of the API as far as they are read
    failures.py    what is told of a failure
    reflector.py   a cache that follows the server
    queue.py       what is to be looked at, each thing by one task at a time
    election.py    who of several operators acts
    worker_pod.py  how a worker's pod is made; installation.py: what is the same for all; isolation.py: what it may do
    status.py      conditions and counts of a pool
    actuator.py    effects of the ledger -> calls
    keeper.py      one pool: get, decide, commit, act
    operator.py    all of it together; web.py: what it says of itself
    companions.py  what goes along with a pool:
      rosters.py       which workers the control plane may take
      budgets.py       its PodDisruptionBudget
      scaler.py        its size by demand (`greenroom.core.scaling`), kept as scaled.py says
      sandboxes.py     what its sandboxes are run with
    templates.py   ActorTemplates; template_status.py: what is said of them
    plane.py       port: Greenroom's control plane; control.py: by its API
    specs.py       what the custom resources hold; crds.py: their definitions

What a pool's workers are is decided by `greenroom.core.ledger`, from what is read here; nothing here decides that.
"""
