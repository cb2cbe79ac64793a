"""What is tried on a real cluster, the one that KUBECONFIG names."""
