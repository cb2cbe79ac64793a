"""Stacks whose parts run in processes of their own, so that each can be killed."""

from tests.journeys.conftest import make_stack

__all__ = ["make_stack"]
