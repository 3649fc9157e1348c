"""Tables of classes by name: trainers, methods, pipelines, samplers, architectures and trackers."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from trlx.compat.hooks import check_hooks
from trlx.strict import suggestion


class Registry:
    """A case-insensitive table of classes.

    Used as a decorator, bare or with a name: ``@register_trainer`` or ``@register_trainer("MyTrainer")``.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._classes: dict[str, tuple[str, type]] = {}
        """By name in lower case, the name as it was written and the class."""

    def register(self, target: type | str | None = None) -> type | Callable[[type], type]:
        """Adds a class under its own name, or under the name given; warns if the name was another class's.

        Raises:
            TypeError: the class has a method that CarperAI's trlx called and this library does not, see `check_hooks`.
        """
        if isinstance(target, type):
            return self._add(target.__name__, target)
        return lambda cls: self._add(target or cls.__name__, cls)

    def get(self, name: str) -> type:
        """The class registered as `name`, in any case.

        Raises:
            ValueError: the name is unknown; the message lists the known ones.
        """
        if str(name).lower() not in self._classes:
            names = self.names()
            raise ValueError(f"Unknown {self.kind} {name!r}.{suggestion(name, names)} Known: {', '.join(names)}")
        return self._classes[str(name).lower()][1]

    def names(self) -> list[str]:
        """The registered names as they were written, sorted."""
        return sorted(name for name, _ in self._classes.values())

    def _add(self, name: str, cls: type) -> type:
        check_hooks(self.kind, cls)
        before = self._classes.get(name.lower(), (name, cls))[1]
        if (before.__module__, before.__qualname__) != (cls.__module__, cls.__qualname__):
            places = [f"{each.__module__}.{each.__qualname__}" for each in (cls, before)]
            warnings.warn(f"{self.kind} {name!r} is {places[0]} from now on, not {places[1]}", stacklevel=3)
        self._classes[name.lower()] = name, cls
        return cls


trainers = Registry("trainer")
methods = Registry("method")
pipelines = Registry("pipeline")
samplers = Registry("sampler")
architectures = Registry("architecture")
trackers = Registry("tracker")

register_trainer = trainers.register
register_method = methods.register
register_datapipeline = pipelines.register
register_sampler = samplers.register
register_architecture = architectures.register
register_tracker = trackers.register
