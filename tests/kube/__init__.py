"""A small Kubernetes API server whose pods are local sandboxes, and what is tested on it."""
