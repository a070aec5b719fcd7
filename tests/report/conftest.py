"""Cards of hub models are fetched from the hub of tests/hub."""

from tests.hub.conftest import hub

__all__ = ["hub"]
