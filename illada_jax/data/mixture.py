"""Which corpus example k of a mixture comes from: evenly interleaved, exact to one example at any point of the run."""

from collections.abc import Sequence

_TOTAL = 2**40  # weights as integers, so that nothing is rounded however large k gets


class Mixture:
    """An infinite interleaving of components by weight, with random access."""

    def __init__(self, weights: Sequence[float]):
        self._shares = [max(1, round(weight / sum(weights) * _TOTAL)) for weight in weights]

    def place(self, k: int) -> tuple[int, int]:
        """The component of example k, and how many examples that component has given before."""
        left = sum(self._shares)
        for component, share in enumerate(self._shares):
            # Of the first k that reach this component, so many pass on to the ones after it.
            passed, passed_next = k * (left - share) // left, (k + 1) * (left - share) // left
            if passed == passed_next:
                return component, k - passed
            k, left = passed, left - share
        raise AssertionError("the last component lets nothing pass")

    def counts(self, k: int) -> list[int]:
        """How many of the first k examples come from each component."""
        counts, left = [], sum(self._shares)
        for share in self._shares:
            passed = k * (left - share) // left
            counts.append(k - passed)
            k, left = passed, left - share
        return counts
