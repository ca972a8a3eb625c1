"""Methods: how a pretrained model is changed. What a method author needs is imported from here."""

from luthier.errors import UserError
from luthier.methods.kinds import Bridge, Card, Insert, Method, NeedsWeights, Selection, Surgery, WeightChange, method

__all__ = ["Bridge", "Card", "Insert", "Method", "NeedsWeights", "Selection", "Surgery", "UserError", "WeightChange", "method"]
