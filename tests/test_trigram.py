"""The counting baseline is a probability distribution, or its bits per byte would mean nothing."""

import numpy as np
import pytest

from benchmarks.trigram import Trigram


@pytest.mark.parametrize("context", [[], [3], [3, 4], [9, 9], [1, 2, 3, 4]])
def test_probabilities_sum_to_one_whatever_the_context(context):
    windows = [np.random.default_rng(0).integers(0, 8, size=(4, 30))]
    model = Trigram(windows, vocabulary=10)
    assert sum(model.probability(np.array(context), token) for token in range(10)) == pytest.approx(
        1
    )


def test_what_followed_is_likelier_than_what_did_not():
    model = Trigram([np.array([[1, 2, 3, 1, 2, 3, 1, 2, 3]])], vocabulary=10)
    assert (
        model.probability(np.array([1, 2]), 3) > 0.7 > 0.1 > model.probability(np.array([1, 2]), 4)
    )
