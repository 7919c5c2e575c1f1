"""Which of several hypotheses a system follows, decided question by question: numbers in, numbers out.

A hypothesis predicts the log-probabilities of an answer's tokens, or only the answer. The system deviates from the true
hypothesis by rounding and quantization errors of unknown size.

- **Distances.** A question's deviations are Laplace errors of one unknown scale, which counts as one observation
  however many tokens it has. With the scale integrated out (density 1 / scale), n distances that sum to D have the
  likelihood D^-n, so two hypotheses compare as (D_b / D_a)^n. Distances that every hypothesis shares, because no
  hypothesis affects the question, are informative about the scale: they are added to both sums.
- **Answers.** The answer of the true hypothesis changes with at most the probability `flip_probability`, which depends
  on how close the decision between its best tokens was and on the size of the deviations: rounding, 8 bits or 4 bits,
  each as likely.
- **Fit.** The best hypothesis may still be wrong. A true one misses on a question with a small probability, a wrong one
  hits with at most `WRONG_HITS`.

A hypothesis is excluded once another outweighs it by `bound(error, num_hypotheses)`, or once it does not fit. Under the
true hypothesis, a likelihood ratio is a nonnegative martingale that starts at 1, so the probability that the true one
is ever excluded is at most `error` (Ville 1939; as a test of many hypotheses, Armitage 1950), whichever questions are
chosen and whenever one stops. docs/statistics.md has the details and what the errors were calibrated on.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

SMALLEST_DISTANCE = 2e-3
"""Smaller distances count as this: rounding differs between kernels by about as much."""
DEVIATIONS = (0.02, 0.1, 1.0)
"""Sizes of deviations, in the unit of margins: of rounding, of 8 bits and of 4 bits."""
MOST_OBSERVATIONS = 24
"""Further questions do not count: quantized weights deviate alike in all of them, at times towards a neighbouring exit.
Uncapped, 2 of 40 servers with language models in 4 or 5 bits (organism, random rounding) ran another exit than the one
established at an error level of 1%, after 45 and 51 questions."""
WRONG_HITS = 0.3
"""How often a hypothesis that is wrong, but the best on offer, may fit a question."""


def bound(error: float, num_hypotheses: int = 1) -> float:
    """The log-likelihood ratio at which a decision among that many hypotheses is wrong with probability `error`.

    >>> round(bound(0.01), 2), round(bound(0.01, 18), 2)
    (4.61, 7.5)
    """
    assert 0 < error < 1, f"error={error} is not a probability"
    return float(np.log(num_hypotheses / error))


def distance_ratios(distances: npt.ArrayLike, shared: npt.ArrayLike = ()) -> Floats:
    """Log-likelihood ratios of every hypothesis over every other, from distances.

    Args:
        distances: (questions, hypotheses), 0 or more: the mean absolute difference of log-probabilities.
        shared: (questions,) the same for questions that no hypothesis affects.

    Returns:
        (hypotheses, hypotheses): of the first over the second.

    >>> float(distance_ratios([[0.01, 0.16], [0.02, 0.14]]).round(1)[0, 1])
    4.6
    """
    given = np.maximum(np.asarray(distances, dtype=np.float64), SMALLEST_DISTANCE)
    common = np.maximum(np.asarray(shared, dtype=np.float64), SMALLEST_DISTANCE)
    num_observations = min(len(given) + len(common), MOST_OBSERVATIONS)
    log_likelihood = -num_observations * np.log(given.sum(axis=0) + common.sum())
    ratios: Floats = log_likelihood[:, None] - log_likelihood[None, :]
    return ratios


def answer_ratios(hits: npt.ArrayLike, margins: npt.ArrayLike) -> Floats:
    """Log-likelihood ratios of every hypothesis over every other, from answers alone.

    Args:
        hits: (questions, hypotheses) whether the answer is the hypothesis's.
        margins: (questions, hypotheses) of the hypothesis's answer, as for `flip_probability`.

    Returns:
        (hypotheses, hypotheses): of the first over the second.

    >>> float(answer_ratios([[True, False], [True, True]], [[2.0, 1.5], [3.0, 3.0]]).round(1)[0, 1])
    3.6
    """
    hit, margin = np.asarray(hits, dtype=bool)[:, :, None], np.asarray(margins, dtype=np.float64)
    # one probability for both, so that a question on which they agree does not tell them apart
    flips = flip_probability(np.minimum(margin[:, :, None], margin[:, None, :]))
    by_question: Floats = np.log(np.where(hit, 1 - flips, flips))  # (cases, questions, one, other)
    log_likelihood = logsumexp(by_question.sum(axis=1), axis=0)
    ratios: Floats = log_likelihood - log_likelihood.T
    return ratios


def fit_ratios(hits: npt.ArrayLike, misses: npt.ArrayLike) -> Floats:
    """Log-likelihood ratios of "this hypothesis is true" over "none is".

    Args:
        hits: (questions, hypotheses) whether the hypothesis fits the question.
        misses: (cases, questions, hypotheses) how often a true hypothesis does not fit it, in each of several cases
            that are equally likely.

    Returns:
        (hypotheses,)

    >>> fit_ratios([[True, False]] * 3, np.full((1, 3, 2), 0.1)).round(1).tolist()
    [3.3, -5.8]
    """
    hit, miss = np.asarray(hits, dtype=bool), np.asarray(misses, dtype=np.float64)
    log_likelihood: Floats = np.log(np.where(hit, 1 - miss, miss))
    if_none: Floats = np.log(np.where(hit, WRONG_HITS, 1 - WRONG_HITS))
    ratios: Floats = logsumexp(log_likelihood.sum(axis=1), axis=0) - np.log(len(miss)) - if_none.sum(axis=0)
    return ratios


def flip_probability(margins: npt.ArrayLike) -> Floats:
    """The most often that rounding or quantization changes an answer, for each size of deviations.

    Args:
        margins: Any shape: the smallest difference, along the answer, between the log-probabilities of the best and the
            second best token.

    Returns:
        (3, ...): for rounding, for a language model in 8 bits and for one in 4 bits.

    Measured in 4 bits (docs/statistics.md): 0.6 at margins below 0.2, 0.09 at 1, 0.01 at 2; in 8 bits 0.04 at 0.1.

    >>> flip_probability([0.1, 1.0]).round(3).tolist()
    [[0.005, 0.005], [0.146, 0.005], [0.5, 0.146]]
    """
    margin = np.asarray(margins, dtype=np.float64)
    scales = np.asarray(DEVIATIONS).reshape(-1, *[1] * margin.ndim)
    probability: Floats = np.minimum(0.5, 0.7 * np.exp(-1.6 * margin / scales) + 0.005)
    return probability
