"""Checks of chapter 1: dense attention, and what it costs."""

import numpy as np

from rpa.check.exercise import Exercise

RNG = np.random.default_rng(1)


def normal(*shape):
    """f32[shape] of standard normal numbers, the same at every run."""
    return RNG.standard_normal(shape).astype(np.float32)


# 1.1 softmax -------------------------------------------------------------------------------------


def _softmax(scores):
    scores = np.asarray(scores, np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


softmax = Exercise("1.1", _softmax, axes=("query", "key"), tolerance=1e-6)
softmax.case("two queries, three keys", scores=np.float32([[0, 0, 0], [1, 2, 3]]))
softmax.case("scores far from zero", scores=np.float32([[100, 101, 102], [-200, -201, -202]]))
softmax.case("one key", scores=np.float32([[5.0]]))
softmax.case("more keys than queries", scores=3 * normal(4, 33))


@softmax.mistake("the largest score is not subtracted before exp: exp(89) is infinite in float32")
def _unstable(scores):
    scores = np.asarray(scores, np.float32)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        weights = np.exp(scores)
        return weights / weights.sum(-1, keepdims=True)


@softmax.mistake("the sum runs over the queries (axis 0) and not over the keys of each query")
def _over_queries(scores):
    return _softmax(np.asarray(scores).T).T


@softmax.mistake("the weights are not divided by their sum")
def _not_divided(scores):
    scores = np.asarray(scores, np.float32)
    return np.exp(scores - scores.max(-1, keepdims=True))


@softmax.mistake("the sum runs over the whole array and not over each row")
def _over_everything(scores):
    weights = _not_divided(scores)
    return weights / weights.sum()


@softmax.mistake("one maximum of the whole array is subtracted: rows far below it become 0 / 0")
def _one_maximum(scores):
    scores = np.asarray(scores, np.float32)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max())
        return weights / weights.sum(-1, keepdims=True)
