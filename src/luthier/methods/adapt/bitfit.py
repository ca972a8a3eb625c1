"""BitFit: only the biases learn (Ben Zaken, Goldberg & Ravfogel 2022, arXiv 2106.10199)."""

from luthier.methods import Card, Selection, UserError, method


@method
class BitFit(Selection):
    """Train every bias, those of the norms included, and the head."""

    card = Card(
        name="bitfit",
        use="train only the biases: about 0.1 % of an encoder",
        source="Ben Zaken et al. 2022, arXiv 2106.10199, section 3",
        writes={"weights"},
        promises={"starts_at_base", "keeps_shapes", "reloads_in_stock_transformers", "resumes_exactly"},
        lr=3e-3,
        examples=("bitfit",),
        gaps={"*:llama": "it has no biases", "*:t5": "it has no biases"},
    )

    def opens(self, anatomy):
        biases = [tensor.name for tensor in anatomy.tensors() if tensor.part == "bias"]
        if not any(tensor.part == "bias" and tensor.role != "head" for tensor in anatomy.tensors()):
            raise UserError(f"bitfit: this {anatomy.family} has no biases, so there is nothing to train. Use lora or adapter.")
        return biases
