"""The contract suite: what every method promises, tried on tiny models of every architecture.

    luthier contract METHOD          one method, every architecture, killed and resumed
    luthier contract --all           every method

In an outside package's own tests:

    from luthier.contract import cases
    @pytest.mark.parametrize("case", cases("my_method"), ids=str)
    def test_contract(case): case.run()
"""

from luthier.contract.suite import ARCHITECTURES, Case, Outcome, cases, run

__all__ = ["ARCHITECTURES", "Case", "Outcome", "cases", "run"]
