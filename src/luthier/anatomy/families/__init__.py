"""Role maps, one file a family: each module has a `FAMILY`."""

from luthier.anatomy.family import Family, Stack, register

__all__ = ["Family", "Stack", "register"]
