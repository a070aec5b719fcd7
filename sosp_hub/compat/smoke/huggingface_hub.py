"""Smoke tests of `sosp_hub.compat.huggingface_hub`."""

from huggingface_hub import get_session

from sosp_hub.compat import huggingface_hub as compat
from sosp_hub.compat.smoke import expect, smoke


@smoke("which files a push leaves out, and what `inspect --verify` compares")
def hash_of_git() -> None:
    given = compat.git_hash(b"")
    expect(given == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", f"an empty file is {given}")


@smoke("trying a push again after the connection broke")
def errors_of_the_transport() -> None:
    error = compat.transport_error()
    names = {cls.__name__ for cls in error.__subclasses__()}
    expect(issubclass(error, Exception), f"{error} is no error")
    expect({"NetworkError", "TimeoutException"} <= names, f"kinds of it are {sorted(names)}")


@smoke("limits of size and time for the answers of a hub")
def answers_as_streams() -> None:
    stream, hooks = compat.byte_stream(), get_session().event_hooks
    expect(hasattr(stream, "close"), f"{stream} has no close()")
    expect(isinstance(hooks, dict), f"event_hooks of the session are {hooks}")
