"""Every build of the manifests: each overlay, and the base with each choice of components.

`python -m infra.kubernetes.builds FOLDER` writes them there, one file a build, for checkers that read files.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
OVERLAYS = tuple(sorted(path.name for path in (FOLDER / "overlays").iterdir() if path.is_dir()))
COMPONENTS = ("network-policy", "autoscaling", "warm-pool", "placeholder", "gvisor")  # the last changes the others


def builds() -> Iterator[tuple[str, str]]:
    """The name and the YAML of each. Raises CalledProcessError, FileNotFoundError where there is no kubectl."""
    for overlay in OVERLAYS:
        yield overlay, kustomize(FOLDER / "overlays" / overlay)
    for count in range(len(COMPONENTS) + 1):
        for chosen in itertools.combinations(COMPONENTS, count):
            yield "+".join(("base", *chosen)), combine(chosen)


def combine(components: tuple[str, ...]) -> str:
    """The base with these components. Raises as `builds`."""
    with tempfile.TemporaryDirectory() as folder:
        here = os.path.relpath(FOLDER, Path(folder).resolve())  # kustomize takes no absolute path
        lines = [
            "apiVersion: kustomize.config.k8s.io/v1beta1",
            "kind: Kustomization",
            f"resources: [{here}/base]",
            f"components: [{', '.join(f'{here}/components/{name}' for name in components)}]",
        ]
        (Path(folder) / "kustomization.yaml").write_text("\n".join(lines))
        return kustomize(Path(folder))


def kustomize(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder; its complaint goes to standard error. Raises as `builds`."""
    return subprocess.run(["kubectl", "kustomize", folder], check=True, stdout=subprocess.PIPE, text=True).stdout


def main(folder: Path) -> None:
    """Write every build into the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in builds():
        (folder / f"{name}.yaml").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
