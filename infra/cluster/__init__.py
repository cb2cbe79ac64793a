"""A real Kubernetes cluster of one node on a bare Debian machine, as root and without any image registry.

`python -m infra.cluster up` starts it and leaves it running, `down` leaves nothing of it behind; docs/cluster.md says
what it is made of and how it differs from a cluster of Google's.
"""
