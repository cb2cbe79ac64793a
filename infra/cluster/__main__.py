"""`python -m infra.cluster build|up|load|images|down|status`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from infra.cluster import build, builder, lifecycle
from infra.cluster.layout import ClusterFailed, Layout

STATE = Path(".pigeon") / "cluster"


def main() -> int:
    """Returns the exit code: 1 for a cluster that is not there, cannot be built or cannot be started."""
    options = _options()
    try:
        return _do(options.verb, Layout(options.state.resolve()))
    except ClusterFailed as error:
        print(f"cluster: {error}", file=sys.stderr)  # noqa: T201
        return 1


def _do(verb: str, layout: Layout) -> int:
    if verb == "build":
        print(build.kube_binary())  # noqa: T201
        return 0
    if verb == "down":
        lifecycle.down(layout)
        return 0
    if verb == "up":
        lifecycle.up(layout)
    if verb == "load":
        lifecycle.load(layout)
    if verb == "images":
        builder.build_and_load(layout)
    if not lifecycle.is_ready(layout):
        print("not running")  # noqa: T201
        return 1
    _describe(layout)
    return 0


def _describe(layout: Layout) -> None:
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in lifecycle.steps(layout).items())
    print(f"ready: {times}\nlogs in {layout.logs}, kubectl is {layout.state / 'kubectl'}")  # noqa: T201
    print(f"export KUBECONFIG={layout.kubeconfig}")  # noqa: T201


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m infra.cluster", description="a Kubernetes cluster of one node")
    parser.add_argument("verb", choices=("build", "up", "load", "images", "down", "status"))
    parser.add_argument("--state", type=Path, default=STATE, help="its folder; default .pigeon/cluster")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
