"""NeMo AutoModel's base classes, for a class that is not derived from them: found where NeMo is, never imported."""

from __future__ import annotations

import functools
import sys
import types

_BASES = (
    ("nemo_automodel.components.moe.state_dict_mixin", "MoESplitExpertsStateDictMixin"),
    ("nemo_automodel.components.checkpoint.state_dict_adapter", "StateDictAdapter"),
)
"""What NeMo's callers ask `isinstance` of, and whose defaults they may call; which these are differs by version."""

_PLAIN = "_class_without_nemo"


def with_bases(cls: type) -> type:
    """`cls` with those of NeMo's bases behind it that have been imported; `cls` itself where there are none."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _BASES)
    bases = tuple(base for base in found if base is not None and not issubclass(cls, base))
    return _derive(cls, bases) if bases else cls


def without_bases(cls: type) -> type:
    """The inverse of `with_bases`."""
    plain: type = getattr(cls, _PLAIN, cls)
    return plain


@functools.cache
def _derive(cls: type, bases: tuple[type, ...]) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, _PLAIN: cls}
    return types.new_class(cls.__name__, (cls, *bases), exec_body=lambda body: body.update(names))
