"""A Kubernetes API server for tests: real semantics over real HTTP, and an adversary inside it. No etcd, no nodes.

For clients that nobody here wrote (kubectl works with it), and for a controller that is to be shown everything that a
real server may do to it. What it holds is one log of changes; what a client sees are views of that log.

    resources.py   kinds, built in and from CustomResourceDefinitions
    objects.py     the log and the rules: versions, generations, finalizers, graceful deletion, subresources
    patches.py     JSON patch, merge patches, server-side apply
    schema.py      structural schemas: validation, pruning, defaults
    protobuf.py    the few kinds that clients send as that
    selectors.py   label and field selectors
    views.py       what a replica of the server shows of the log: lag, compaction, watches
    api.py         requests: discovery, verbs, tables, watches
    cluster.py     garbage collector, and nodes that run pods (by saying so)
    kubelet.py     a node that runs them as processes; pod_process.py, pod_setup.py: one pod
    adversary.py   delayed, lost and refused requests
    rbac.py        roles, and which of their rights are used
    portforward.py what pods serve, through the server
    http.py        the server

Not there: users (a guard knows one, `rbac`), admission webhooks, API priority, conversion between
versions, logs and exec.
"""
