"""Every error a user can meet: what was given, what was expected, what to write instead."""

import re
from collections.abc import Sequence

_LONGEST = 10_000  # characters of an error; beyond, nobody reads it
_LONGEST_FAULT = 600
_LONGEST_VALUE = 120
_MOST_FAULTS = 18
_CONTROL = re.compile(
    # What moves a cursor, hides text, ends a line or turns the direction of reading.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
    "\ud800-\udfff\ufff9-\ufffb]"
)


def printable(text: str) -> str:
    r"""The text with control characters spelled out, so that a terminal does not obey them.

    >>> printable("a class" + chr(27) + "[2J")
    'a class\\x1b[2J'
    """
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def shortened(text: str, longest: int = _LONGEST_VALUE) -> str:
    """The text, or its beginning and how much more there is."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"


_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|\bapi_org_[A-Za-z0-9]{8,}")
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def without_secrets(text: str) -> str:
    """The text without access tokens, and without the user that a URL names.

    >>> without_secrets("https://me:word@host/x hf_abcdefghijk")
    'https://[removed]@host/x [token removed]'
    """
    return _TOKEN.sub("[token removed]", _USER_OF_URL.sub("[removed]", text))


def has_token(text: str) -> bool:
    """Whether something in the text looks like an access token."""
    return _TOKEN.search(text) is not None


class SospHubError(Exception):
    """Base of all errors that are about the user's input and not a defect of the program.

    Its words come from files of strangers too: they are of limited length, safe to print, and hold
    no access token.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(printable(without_secrets(message)), _LONGEST))


class RecipeError(SospHubError):
    """A recipe that cannot be run. Holds every fault that was found, not only the first."""

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.source = source
        self.faults = tuple(shortened(fault, _LONGEST_FAULT) for fault in faults)
        lines = "\n".join(f"  - {fault}" for fault in self.faults[:_MOST_FAULTS])
        if len(self.faults) > _MOST_FAULTS:
            lines += f"\n  and {len(self.faults) - _MOST_FAULTS} more"
        noun = "fault" if len(self.faults) == 1 else "faults"
        super().__init__(f"{source}: {len(self.faults)} {noun}\n{lines}")


class DataError(SospHubError):
    """Data that is missing, empty, or does not fit the model."""


class ModelError(SospHubError):
    """A model that cannot be found, loaded or used for the task."""


class TraceError(SospHubError):
    """A forward pass that could not be followed, or a model none of whose structures can be cut."""


class CriterionError(SospHubError):
    """A criterion that is unknown, or that cannot score what it was given."""


class BudgetError(SospHubError):
    """A budget that no plan can meet."""


class PlanError(SospHubError):
    """A plan that does not fit the model it is applied to."""


class VerificationError(SospHubError):
    """A cut whose output differs from the masked model.

    Attributes:
        groups: The groups whose cut goes wrong, as far as they could be told.
    """

    def __init__(self, message: str, groups: Sequence[str] = ()) -> None:
        self.groups = tuple(groups)
        super().__init__(message)


class CheckpointError(SospHubError):
    """A checkpoint that is damaged, hostile, or written for something else."""


class OutputError(SospHubError):
    """An output that cannot be written."""


class OutputExistsError(OutputError):
    """An output folder that already holds a finished run."""


class HubError(SospHubError):
    """A hub that cannot be reached or refuses what was asked."""
