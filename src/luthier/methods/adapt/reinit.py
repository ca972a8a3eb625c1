"""Re-initialisation of the top blocks, whose features are the most tied to pretraining (Zhang et al. 2021, arXiv 2006.05987, section 4)."""

from luthier.anatomy import reinitialise
from luthier.methods import Card, Surgery, UserError, method


@method
class Reinit(Surgery):
    """Give the last `top` blocks, and the pooler where there is one, fresh values by the model's own rule."""

    top: int

    card = Card(
        name="reinit",
        use="start the top blocks afresh before full training: steadier with few rows",
        source="Zhang et al. 2021, arXiv 2006.05987, section 4",
        writes={"weights"},
        promises={"keeps_shapes", "reloads_in_stock_transformers", "resumes_exactly"},
        examples=("reinit(top=1)|full",),
        gaps={"*:albert": "its blocks are one set of weights"},
    )

    def check(self, anatomy):
        depth = len(anatomy.blocks)
        if not 1 <= self.top <= depth:
            raise UserError(f"reinit: top={self.top}, but this model has {depth} blocks: give 1 to {depth}.")
        if len({id(block.module) for block in anatomy.blocks}) < depth:
            raise UserError(f"reinit: the {depth} blocks of this {anatomy.family} are one set of weights; the top ones cannot be re-initialised alone.")

    def cut(self, anatomy, rng):
        modules = [block.module for block in anatomy.blocks[-self.top :]] + [site.module for site in anatomy.pooler]
        return reinitialise(anatomy.model, modules, rng)
