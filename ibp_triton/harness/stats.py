"""Bootstrap bands over seeds and examples; p-values corrected for how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from torch import Tensor

Band = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def band(right: Tensor, resamples: int = 500, share: float = 0.95) -> Band:
    """Bounds [levels] of the mean error in per cent, from outcomes [seeds, levels, examples].

    Seeds and examples are resampled with replacement, examples alike in every seed and level; fixed draws.
    """
    return _band((~right).numpy().astype(np.float32), resamples, share)


def difference_band(first: Tensor, second: Tensor, resamples: int = 500, share: float = 0.95) -> Band:
    """`band` of the error of the first outcomes less that of the second, paired by seed and example."""
    wrong = ((~part).numpy().astype(np.float32) for part in (first, second))
    return _band(np.subtract(*wrong), resamples, share)


def _band(wrong: npt.NDArray[np.float32], resamples: int, share: float) -> Band:
    seeds, levels, examples = wrong.shape
    weights, chosen = _draws(seeds, examples, resamples)
    by_seed = 100 * (wrong.reshape(-1, examples) @ weights).reshape(seeds, levels, resamples)
    means = np.einsum("slr,sr->lr", by_seed, chosen)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2], axis=1)
    return low, high


@lru_cache(maxsize=2)  # 20 MB each with 10 000 examples
def _draws(seeds: int, examples: int, resamples: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Shares of examples [examples, resamples] and of seeds [seeds, resamples]: nine tenths of the time of a band."""
    draws = np.random.default_rng(0)
    weights = draws.multinomial(examples, np.full(examples, 1 / examples), resamples).astype(np.float32).T / examples
    return weights, draws.multinomial(seeds, np.full(seeds, 1 / seeds), resamples).T / seeds


def holm(found: Sequence[float]) -> list[float]:
    """The p-values of one family, each corrected after Holm (1979): below α, the family errs in a share α of cases."""
    corrected, least = [0.0] * len(found), 0.0
    for rank, number in enumerate(sorted(range(len(found)), key=found.__getitem__)):
        least = max(least, min(1.0, (len(found) - rank) * found[number]))
        corrected[number] = least
    return corrected
