"""The weights that explain values best, by normal equations: a handful of columns, no library."""

from __future__ import annotations

from collections.abc import Sequence

RIDGE = 1e-9
"""Of a column's own square: columns that say the same share the weight instead of failing."""


class Products:
    """Sums of products of columns, from which any subset of them can be fitted to the last."""

    __slots__ = ("_sums", "count")

    def __init__(self, columns: Sequence[Sequence[float]]) -> None:
        self.count = len(columns[0])
        self._sums = [[0.0] * len(columns) for _ in columns]
        for i, left in enumerate(columns):
            for j, right in enumerate(columns[: i + 1]):
                product = sum(map(float.__mul__, left, right))
                self._sums[i][j] = self._sums[j][i] = product

    def fitted(self, chosen: Sequence[int]) -> tuple[list[float], float] | None:
        """A weight for each chosen column, and the sum of squared errors that is left.

        None where there are fewer rows than weights, or nothing that tells columns apart.
        """
        if self.count < len(chosen):
            return None
        sums, target = self._sums, len(self._sums) - 1
        matrix = [[*(sums[i][j] for j in chosen), sums[i][target]] for i in chosen]
        for at in range(len(chosen)):
            matrix[at][at] *= 1 + RIDGE
        weights = _solved(matrix)
        if weights is None:
            return None
        explained = sum(weight * sums[i][target] for weight, i in zip(weights, chosen, strict=True))
        return weights, max(0.0, sums[target][target] - explained)


def _solved(matrix: list[list[float]]) -> list[float] | None:
    """Gauss-Jordan with pivots; each row ends with its right side."""
    width = len(matrix)
    for at in range(width):
        pivot = max(range(at, width), key=lambda row: abs(matrix[row][at]))
        if abs(matrix[pivot][at]) < 1e-300:
            return None
        matrix[at], matrix[pivot] = matrix[pivot], matrix[at]
        scale = matrix[at][at]
        matrix[at] = [value / scale for value in matrix[at]]
        for row in range(width):
            if row != at and (factor := matrix[row][at]):
                pairs = zip(matrix[row], matrix[at], strict=True)
                matrix[row] = [a - factor * b for a, b in pairs]
    return [row[-1] for row in matrix]
