"""Freezing from the bottom: embeddings and the first blocks keep their values."""

from luthier.methods import Card, Selection, UserError, method


@method
class Freeze(Selection):
    """Train what lies above the embeddings and the first `bottom` blocks, counted in the order of the forward pass."""

    bottom: int

    card = Card(
        name="freeze",
        use="full training of the upper blocks only: less memory, less forgetting",
        source="Lee, Tang & Lin 2019, What Would Elsa Do? (arXiv 1911.03090)",
        writes={"weights"},
        promises={"starts_at_base", "keeps_shapes", "reloads_in_stock_transformers", "resumes_exactly"},
        lr=1e-4,
        examples=("freeze(bottom=1)",),
        gaps={"*:albert": "its blocks are one set of weights"},
    )

    def check(self, anatomy):
        depth = len(anatomy.blocks)
        if not 0 <= self.bottom < depth:
            raise UserError(f"freeze: bottom={self.bottom}, but this model has {depth} blocks: give 0 to {depth - 1}, or use head to freeze them all.")
        if self.bottom and _shared(anatomy):
            raise UserError(f"freeze: the {depth} blocks of this {anatomy.family} are one set of weights, so the lower ones cannot be frozen alone. Use freeze(bottom=0), lora or full.")

    def opens(self, anatomy):
        frozen = {name for block in anatomy.blocks[: self.bottom] for name in block.parameter_names}
        return [t.name for t in anatomy.tensors() if t.role != "embeddings" and t.name not in frozen]


def _shared(anatomy) -> bool:
    modules = [id(block.module) for block in anatomy.blocks]
    return len(set(modules)) < len(modules)
