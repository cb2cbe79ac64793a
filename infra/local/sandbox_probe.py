"""What isolates sessions on this machine, and what to do where nothing can."""

from __future__ import annotations

import os

from infra.local import bubblewrap
from infra.local.sandbox_record import Record
from schemas.ids import new_id
from schemas.limits import Limits
from schemas.ports import SandboxSpec

PROBE_SECONDS = 20.0  # a loaded machine takes one or two

WAY_OUT = (
    "PIGEON_UNSAFE_NO_SANDBOX=1 runs sessions as plain processes instead: anything typed there can do whatever "
    "this user can."
)
NAMESPACES = (
    "User namespaces must be allowed for this user: sysctl kernel.unprivileged_userns_clone=1 (Debian) or "
    "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu); in a container "
    "--security-opt seccomp=unconfined --security-opt apparmor=unconfined."
)
REMEDIES = {  # what bwrap or the launcher said: what to do about it
    "max_*_namespaces": "More user namespaces must be allowed here: sysctl user.max_user_namespaces.",
    "mount proc": "In a container /proc must not be masked: docker run --security-opt systempaths=unconfined.",
    "no usable bubblewrap": "",
    "CAP_SETUID": "Start it with these capabilities, or as a user who is not root.",
    "uid map": NAMESPACES,  # what AppArmor's restriction looks like
    "Permission denied": "A file that the sandbox needs cannot be read by other users.",
}


def probe_spec(limits: Limits) -> SandboxSpec:
    """A sandbox like those of sessions, for a minute."""
    return SandboxSpec(
        name=f"probe-{new_id()}",
        session=None,
        memory_bytes=limits.memory_bytes,
        workspace_bytes=limits.workspace_bytes,
        processes=limits.processes,
        file_bytes=limits.file_bytes,
        lifetime_seconds=60,
    )


def isolation(record: Record) -> str:
    """In one line, what isolates this running sandbox."""
    meta = record.meta()
    counted = meta is not None and any(map(os.path.exists, meta.cgroups))
    user = meta.host_uid if meta else None
    if user is None:
        who = "in user namespaces of this user's"
    elif bubblewrap.user_namespaces(user):
        who = "in user namespaces, each as a user of its own"
    else:
        who = "without user namespaces, each as a user of its own"
    what = "in all, by cgroup" if counted else "for each process"
    return f"bubblewrap ({bubblewrap.find_bwrap()}) {who}; memory is limited {what}"


def advice(failure: str) -> str:
    """The failure, and what a person can do about it."""
    remedy = next((remedy for sign, remedy in REMEDIES.items() if sign in failure), NAMESPACES)
    return " ".join(filter(None, [f"Sessions cannot be isolated on this machine: {failure}.", remedy, WAY_OUT]))
