"""Linear probing: the trunk stays as it is, only what reads it learns."""

from luthier.methods import Card, Selection, UserError, method


@method
class Head(Selection):
    """Train the task's head, and the pooler between trunk and head where the family has one."""

    card = Card(
        name="head",
        use="train only the task's head on a frozen trunk: the cheapest, a lower bound for the others",
        source="linear probing; Alain & Bengio 2016",
        writes={"weights"},
        promises={"starts_at_base", "keeps_shapes", "reloads_in_stock_transformers", "resumes_exactly"},
        lr=3e-3,
        examples=("head",),
        gaps={"*:gpt2": "as a language model its output layer is the embedding, so there is no head of its own"},
    )

    def opens(self, anatomy):
        names = [tensor.name for tensor in anatomy.tensors() if tensor.role in ("head", "pooler")]
        if not any(tensor.role == "head" for tensor in anatomy.tensors()):
            raise UserError("head: this model has no head of its own to train (the task reads the trunk's output, or the output layer is the embedding). Use lora, bitfit or full.")
        return names
