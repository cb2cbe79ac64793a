"""Names the agent's ConfigMap after the agent: `python -m infra.kubernetes.agent` after a change of it."""

from __future__ import annotations

from infra.adapters.kube_pod import AGENT_SOURCE, agent_config_map_name

KUSTOMIZATION = AGENT_SOURCE.with_name("kustomization.yaml")  # kustomize reads no file outside its own folder


def kustomization() -> str:
    """What makes a ConfigMap of the agent, under the name by which workers look for it."""
    return f"""\
# The agent as a ConfigMap, for images that have none. It never changes: another agent has another name, and sandboxes
# that run keep theirs. Written by `python -m infra.kubernetes.agent`.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: pigeon-sandboxes
configMapGenerator:
  - name: {agent_config_map_name()}
    files:
      - __main__.py=agent.py
    options:
      immutable: true
      disableNameSuffixHash: true
"""


if __name__ == "__main__":
    KUSTOMIZATION.write_text(kustomization())
