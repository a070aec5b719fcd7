"""Every error a user can meet: what was given, what was expected, what to write instead."""

from collections.abc import Sequence


class SospHubError(Exception):
    """Base of all errors that are about the user's input and not a defect of the program."""


class RecipeError(SospHubError):
    """A recipe that cannot be run. Holds every fault that was found, not only the first."""

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.source = source
        self.faults = tuple(faults)
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
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


class OutputExistsError(SospHubError):
    """An output folder that already holds a finished run."""


class HubError(SospHubError):
    """A hub that cannot be reached or refuses what was asked."""
