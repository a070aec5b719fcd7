"""Ways to do one thing, each declared once: a strict option model in a file of its own.

Three lines make a kind of such ways (criteria, rebuild methods, tasks, targets)::

    class Rebuild(Declared): ...                     # what all of them take and say of themselves
    REBUILDS = Registry("sosp_hub.rebuild", Rebuild, noun="rebuild method", default="ridge")
    AnyRebuild = Annotated[SerializeAsAny[Rebuild], REBUILDS]  # the type of a key in a recipe

and ``@REBUILDS.declare`` above a subclass in a file of that package is all that a new one needs:
the recipe, ``--help`` and errors read it from there. Such a file loads without torch: what it
computes with is imported inside its functions.
"""

import difflib
import importlib
import pkgutil
import typing
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from sosp_hub.recipe.section import Section


class Declared(Section):
    """One way to do something: its options, with what is said of it as class attributes.

    A subclass has a field ``name: Literal["its_name"] = "its_name"``, which is also the name of its
    file, and the first line of its docstring says what it is.

    Attributes:
        name: What it is called in recipes.
        paper: Where it comes from.
    """

    name: str
    paper: ClassVar[str] = ""

    @classmethod
    def key(cls) -> str:
        """Its name in recipes."""
        return cls.model_fields["name"].default

    @classmethod
    def summary(cls) -> str:
        """What it is, in a line."""
        return (cls.__doc__ or "").strip().partition("\n")[0].rstrip(".")


D = TypeVar("D", bound=Declared)


class Registry(Generic[D]):
    """The ways that are declared in the files of a package; in an annotation, a key that takes one.

    Args:
        package: Its files are imported when a name is first looked up; packages inside it are not.
        base: What all of them take.
        noun: What one of them is called in errors.
        default: The one that is meant where no name is given; None = a name must be given.
    """

    def __init__(
        self, package: str, base: type[D], *, noun: str, default: str | None = None
    ) -> None:
        self.package, self.base, self.noun, self.default = package, base, noun, default
        self._models: dict[str, type[D]] = {}
        self._complete = False

    def declare(self, model: type[D]) -> type[D]:
        """Makes a way known; a decorator of its class.

        Raises:
            ValueError: A name that is taken.
        """
        other = self._models.setdefault(model.key(), model)
        if (other.__module__, other.__qualname__) != (model.__module__, model.__qualname__):
            raise ValueError(
                f"{self.noun} {model.key()!r} is declared twice: in {other.__module__} and "
                f"{model.__module__}"
            )
        self._models[model.key()] = model
        return model

    @staticmethod
    def of(field: FieldInfo) -> "Registry[Any] | None":
        """The registry that a key of a recipe takes its section from, or a list of them."""
        inner = (
            each
            for part in typing.get_args(field.annotation)
            if typing.get_origin(part) is typing.Annotated
            for each in part.__metadata__
        )
        return next(
            (each for each in (*field.metadata, *inner) if isinstance(each, Registry)), None
        )

    def forget(self, name: str) -> None:
        """Takes one out again, such as one that only a test declares."""
        del self._models[name]

    def known(self) -> dict[str, type[D]]:
        """All of them by name."""
        if not self._complete:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                if not module.ispkg:
                    importlib.import_module(f"{self.package}.{module.name}")
            self._complete = True
        return dict(sorted(self._models.items()))

    def get(self, name: Any) -> type[D] | None:
        """The one of this name; None where there is none."""
        return self.known().get(name) if isinstance(name, str) else None

    def require(self, name: Any, error: Callable[[str], Exception]) -> type[D]:
        """The one of this name; raises what ``error`` makes of a message where there is none."""
        if model := self.get(name):
            return model
        near = difflib.get_close_matches(str(name), list(self.known()), n=1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        raise error(f"unknown {self.noun} {name!r}{guess}; there are {', '.join(self.known())}")

    def given(self, section: Any) -> type[D] | None:
        """The one that a section of a recipe names, or leaves to the default."""
        if isinstance(section, self.base):
            return type(section)
        name = section.get("name", self.default) if isinstance(section, dict) else None
        return self.get(name)

    def validate(self, section: Any) -> Any:
        """A section of a recipe as the options of the way that it names."""
        if isinstance(section, self.base):
            return section
        if not isinstance(section, dict):
            raise PydanticKnownError("model_type", {"class_name": self.base.__name__})
        if "name" not in section and self.default is None:
            raise PydanticKnownError("missing")
        section = {"name": self.default, **section}
        model = self.given(section)
        if model is None:
            raise PydanticCustomError("unknown_name", "unknown {noun}", {"noun": self.noun})
        return model.model_validate(section)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Validates as the way that is named."""
        return core_schema.no_info_before_validator_function(self.validate, handler(source))
