"""Full fine-tuning: every tensor learns."""

from luthier.methods import Card, Selection, method


@method
class Full(Selection):
    """Train everything that the task's forward pass reaches."""

    card = Card(
        name="full",
        use="train every tensor: the usual reference, and the most memory",
        source="common practice; Devlin et al. 2019, section 3.2",
        writes={"weights"},
        promises={"starts_at_base", "keeps_shapes", "reloads_in_stock_transformers", "resumes_exactly"},
        lr=1e-4,
        examples=("full",),
    )

    def opens(self, anatomy):
        return [tensor.name for tensor in anatomy.tensors()]
