"""A model seen by roles, whatever its authors called its modules."""

from luthier.anatomy.anatomy import Anatomy, Block, NamedTensor, Site
from luthier.anatomy.cost import Workload
from luthier.anatomy.family import Family, Stack, register
from luthier.anatomy.surgery import reinitialise

__all__ = ["Anatomy", "Block", "Family", "NamedTensor", "Site", "Stack", "Workload", "register", "reinitialise"]
