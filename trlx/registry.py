"""Name -> class tables for trainers, methods, pipelines, samplers and architectures."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from trlx.compat.hooks import check_hooks


class Registry:
    """A case-insensitive table of classes.

    Used as a decorator, bare or with a name: ``@register_trainer`` or ``@register_trainer("MyTrainer")``.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._classes: dict[str, type] = {}
        self._names: dict[str, str] = {}

    def register(self, target: type | str | None = None) -> type | Callable[[type], type]:
        """Adds a class under its own name, or under the name given.

        Raises:
            TypeError: the class has a method that was called in CarperAI's trlx and is not here, see `check_hooks`.
        """
        if isinstance(target, type):
            return self._add(target.__name__, target)
        return lambda cls: self._add(target or cls.__name__, cls)

    def get(self, name: str) -> type:
        """The class registered as `name`, in any case.

        Raises:
            ValueError: the name is unknown; the message lists the known ones.
        """
        if not isinstance(name, str) or name.lower() not in self._classes:
            raise ValueError(
                f"Unknown {self.kind} {name!r}.{self._nearest(str(name))} Known: {', '.join(self.names())}"
            )
        return self._classes[name.lower()]

    def names(self) -> list[str]:
        """The registered names as they were written, sorted."""
        return sorted(self._names.values())

    def _add(self, name: str, cls: type) -> type:
        check_hooks(self.kind, cls)
        self._classes[name.lower()] = cls
        self._names[name.lower()] = name
        return cls

    def _nearest(self, name: str) -> str:
        close = difflib.get_close_matches(name.lower(), self._classes, n=1)
        return f" Did you mean {self._names[close[0]]!r}?" if close else ""


trainers = Registry("trainer")
methods = Registry("method")
pipelines = Registry("pipeline")
samplers = Registry("sampler")
architectures = Registry("architecture")

register_trainer = trainers.register
register_method = methods.register
register_datapipeline = pipelines.register
register_sampler = samplers.register
register_architecture = architectures.register
