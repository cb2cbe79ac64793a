"""Tests on Google's emulators."""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")  # as the profile does: children exec at once
