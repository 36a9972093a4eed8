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
softmax.case("scores far from each other", scores=np.float32([[-100, 0, 100]]))
softmax.case("one key", scores=np.float32([[5.0]]))
softmax.case("more keys than queries", scores=3 * normal(4, 33))


@softmax.mistake("the largest score is not subtracted before exp: exp(89) is infinite in float32")
def _unstable(scores):
    scores = np.asarray(scores, np.float32)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        weights = np.exp(scores)
        return weights / weights.sum(-1, keepdims=True)


def _subtracting(scores, subtracted):
    """The softmax in float32 less f32[q_len, 1]; it overflows if that is too small."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        weights = np.exp(np.asarray(scores, np.float32) - subtracted)
        return weights / weights.sum(-1, keepdims=True)


@softmax.mistake(
    "something smaller than the row's maximum is subtracted, here the mean: exp of a score that "
    "lies 89 above it is infinite"
)
def _mean_subtracted(scores):
    return _subtracting(scores, np.asarray(scores, np.float32).mean(-1, keepdims=True))


@softmax.mistake(
    "something smaller than the row's maximum is subtracted, here the minimum: exp of a score that "
    "lies 89 above it is infinite"
)
def _minimum_subtracted(scores):
    return _subtracting(scores, np.asarray(scores, np.float32).min(-1, keepdims=True))


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


# 1.2 causal mask ---------------------------------------------------------------------------------


def _causal(q_len, kv_len, offset=0):
    return np.tri(q_len, kv_len, kv_len - q_len + offset, dtype=bool)


mask = Exercise("1.2", _causal, axes=("query", "key"))
mask.case("two new tokens after three cached", q_len=2, kv_len=5)
mask.case("decode: one new token after four cached", q_len=1, kv_len=5)
mask.case("prefill: nothing is cached", q_len=4, kv_len=4)
mask.case("the first token of all", q_len=1, kv_len=1)
mask.case("a chunk of 17 after 47", q_len=17, kv_len=64)


@mask.mistake("the causal mask ignores the cached prefix: query t is taken to stand at position t")
def _ignores_prefix(q_len, kv_len):
    return np.tri(q_len, kv_len, dtype=bool)


@mask.mistake("a token does not see itself: the comparison must be <=, not <")
def _not_itself(q_len, kv_len):
    return _causal(q_len, kv_len, -1)


@mask.mistake("a token sees the one after it: an offset is one too large")
def _one_too_far(q_len, kv_len):
    return _causal(q_len, kv_len, 1)


@mask.mistake("True marks what is hidden and not what is seen")
def _inverted(q_len, kv_len):
    return ~_causal(q_len, kv_len)


@mask.mistake(
    "the comparison is turned round (>= for <=, triu for tril): a query sees itself and the keys "
    "after it, and should see itself and those before it"
)
def _turned_round(q_len, kv_len):
    return ~_causal(q_len, kv_len, -1)


@mask.mistake(
    "the triangle is the upper one (triu for tril) and ignores the cached prefix: query t sees the "
    "keys from t on"
)
def _upper_without_prefix(q_len, kv_len):
    return np.triu(np.ones((q_len, kv_len), bool))


@mask.mistake("every query sees every key: the new tokens see each other's future")
def _no_mask(q_len, kv_len):
    return np.ones((q_len, kv_len), bool)


@mask.mistake("queries and keys are swapped: rows must be queries")
def _swapped(q_len, kv_len):
    return _causal(q_len, kv_len).T


# 1.3 grouped attention ---------------------------------------------------------------------------


def _attend(q, k, v, mask, *, scale=None, hidden=-np.inf, kv_head=None, mix=None):
    """The formula in float64 with a screw for each mistake: how to scale, hide, share and mix.

    A query that sees no key gets NaN, as in JAX.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    shared = np.arange(q.shape[1]) // group if kv_head is None else kv_head(q, k)
    scores = np.einsum("qhd,khd->hqk", q, k[:, shared])
    scores *= q.shape[-1] ** -0.5 if scale is None else scale(q, k)
    scores = np.where(np.asarray(mask), scores, hidden)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True) if mix is None else mix(weights, scores)
    return np.einsum("hqk,khd->qhd", weights, v[:, shared]).astype(np.float32)


def _sequence(q_len, kv_len, num_q_heads, num_kv_heads, head_dim):
    """Arguments of one sequence whose last q_len tokens are new."""
    q = normal(q_len, num_q_heads, head_dim)
    k, v = normal(2, kv_len, num_kv_heads, head_dim)
    return {"q": q, "k": k, "v": v, "mask": _causal(q_len, kv_len)}


grouped = Exercise("1.3", _attend, axes=("query", "head", "lane"), tolerance=1e-5)
grouped.case(
    "one head, two queries: the first sees key 1 only, the second the keys 0 and 1",
    q=np.float32([[[1, 1]], [[1, 1]]]),
    k=np.float32([[[2, 0]], [[0, 2]], [[1, 1]]]),
    v=np.float32([[[10, 0]], [[0, 10]], [[30, 30]]]),
    mask=np.array([[False, True, False], [True, True, False]]),
)
# Few shapes: JAX compiles each operation of the learner's function once a shape.
grouped.case("prefill, four query heads on two KV heads", **_sequence(3, 3, 4, 2, 4))
grouped.case("a chunk after a cached prefix, nine heads on three", **_sequence(4, 17, 9, 3, 16))


@grouped.mistake("neighbouring query heads read different KV heads: 0, 1, 0, 1 and not 0, 0, 1, 1")
def _tiled_heads(q, k, v, mask):
    return _attend(q, k, v, mask, kv_head=lambda q, k: np.arange(q.shape[1]) % k.shape[1])


@grouped.mistake("all query heads read KV head 0")
def _first_head(q, k, v, mask):
    return _attend(q, k, v, mask, kv_head=lambda q, k: np.zeros(q.shape[1], int))


@grouped.mistake("scores are not divided by the root of head_dim")
def _unscaled(q, k, v, mask):
    return _attend(q, k, v, mask, scale=lambda q, k: 1.0)


@grouped.mistake("scores are divided by head_dim and not by its root")
def _scaled_twice(q, k, v, mask):
    return _attend(q, k, v, mask, scale=lambda q, k: 1.0 / q.shape[-1])


@grouped.mistake("the mask is not used")
def _unmasked(q, k, v, mask):
    return _attend(q, k, v, np.ones_like(np.asarray(mask)))


@grouped.mistake("the mask is inverted: True marks the keys that the query sees")
def _mask_inverted(q, k, v, mask):
    return _attend(q, k, v, ~np.asarray(mask))


@grouped.mistake("a causal mask of your own is used, and not `mask`, which may hide other keys too")
def _own_mask(q, k, v, mask):
    return _attend(q, k, v, _causal(len(q), len(k)))


@grouped.mistake(
    "a causal mask of your own is used, and not `mask`; it also ignores the cached prefix"
)
def _own_mask_without_prefix(q, k, v, mask):
    return _attend(q, k, v, np.tri(len(q), len(k), dtype=bool))


@grouped.mistake("the second product mixes keys (K) and not values (V)")
def _mixes_keys(q, k, v, mask):
    return _attend(q, k, k, mask)


@grouped.mistake("hidden scores are set to 0, which still has the weight exp(0) = 1")
def _hidden_zero(q, k, v, mask):
    return _attend(q, k, v, mask, hidden=0.0)


@grouped.mistake("the mask acts after the softmax: hidden keys are left in the sum")
def _mask_late(q, k, v, mask):
    def late(weights, scores):
        return np.asarray(mask) * weights / weights.sum(-1, keepdims=True)

    return _attend(q, k, v, np.ones_like(np.asarray(mask)), mix=late)


@grouped.mistake("the softmax runs over the queries and not over the keys")
def _over_wrong_axis(q, k, v, mask):
    def over_queries(weights, scores):
        with np.errstate(invalid="ignore"):
            shifted = np.exp(scores - scores.max(1, keepdims=True))
            return shifted / shifted.sum(1, keepdims=True)

    return _attend(q, k, v, mask, mix=over_queries)


# 1.4 FLOPs and bytes -----------------------------------------------------------------------------


def _cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    pairs = sum(kv_len - q_len + t + 1 for t in range(q_len))
    numbers = 2 * head_dim * (q_len * num_q_heads + kv_len * num_kv_heads)
    return 4 * num_q_heads * head_dim * pairs, numbers * item_bytes


def _shape(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    """The arguments of a cost case by name."""
    names = ("q_len", "kv_len", "num_q_heads", "num_kv_heads", "head_dim", "item_bytes")
    values = (q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes)
    return dict(zip(names, values, strict=True))


cost = Exercise("1.4", _cost, outputs=("flops", "hbm_bytes"), tolerance=0.0)
cost.case("two queries, five keys, one head", **_shape(2, 5, 1, 1, 4, 2))
cost.case("three tokens at once, two heads", **_shape(3, 3, 2, 2, 4, 4))
cost.case("decode, Llama 3 8B, bfloat16", **_shape(1, 4096, 32, 8, 128, 2))
cost.case("prefill, Llama 3 8B, float8", **_shape(1024, 1024, 32, 8, 128, 1))
cost.case("a chunk after a cached prefix, SmolLM2", **_shape(64, 1000, 9, 3, 64, 2))


@cost.mistake(
    "a multiplication and an addition are counted as one, or one of the two matrix products is "
    "left out: either gives half"
)
def _half(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    flops, hbm_bytes = _cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes)
    return flops // 2, hbm_bytes


@cost.mistake("pairs that the causal mask hides are counted")
def _full_rectangle(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    _, hbm_bytes = _cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes)
    return 4 * num_q_heads * head_dim * q_len * kv_len, hbm_bytes


@cost.mistake("a token does not see itself: query t sees kv_len - q_len + t keys and its own")
def _not_itself_counted(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    _, hbm_bytes = _cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes)
    pairs = sum(kv_len - q_len + t for t in range(q_len))
    return 4 * num_q_heads * head_dim * pairs, hbm_bytes


@cost.mistake("half of all pairs are counted: the mask hides only some pairs of new tokens")
def _half_rectangle(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    _, hbm_bytes = _cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes)
    return 4 * num_q_heads * head_dim * (q_len * kv_len // 2), hbm_bytes


@cost.mistake("the causal mask ignores the cached prefix: new tokens see only new tokens")
def _prefix_not_counted(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    _, hbm_bytes = _cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes)
    return 4 * num_q_heads * head_dim * q_len * (q_len + 1) // 2, hbm_bytes


@cost.mistake("FLOPs are counted for KV heads: each query head computes its own scores")
def _flops_of_kv_heads(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    flops, hbm_bytes = _cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes)
    return flops * num_kv_heads // num_q_heads, hbm_bytes


@cost.mistake("the output is not counted: it is written to HBM, as many numbers as q has")
def _output_forgotten(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    flops, _ = _cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes)
    return flops, head_dim * (q_len * num_q_heads + 2 * kv_len * num_kv_heads) * item_bytes


@cost.mistake("K and V are counted once a query head: the heads of a group share one copy")
def _bytes_of_q_heads(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    flops, _ = _cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes)
    return flops, 2 * head_dim * (q_len + kv_len) * num_q_heads * item_bytes


@cost.mistake("only K is counted, or only V: both are read")
def _only_keys(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    flops, _ = _cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes)
    numbers = head_dim * (2 * q_len * num_q_heads + kv_len * num_kv_heads)
    return flops, numbers * item_bytes


@cost.mistake("queries and output are forgotten: in a prefill they are most of the bytes")
def _only_cache(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    flops, _ = _cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes)
    return flops, 2 * head_dim * kv_len * num_kv_heads * item_bytes


@cost.mistake(
    "the new K and V are counted once more, as written: a kernel does write them, but this "
    "exercise leaves that out"
)
def _with_writes(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    flops, hbm_bytes = _cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes)
    return flops, hbm_bytes + 2 * q_len * num_kv_heads * head_dim * item_bytes


@cost.mistake("numbers are counted and not bytes: item_bytes is not used")
def _numbers(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, item_bytes):
    return _cost(q_len, kv_len, num_q_heads, num_kv_heads, head_dim, 1)


# 1.5 sliding window ------------------------------------------------------------------------------


def _range(q_len, kv_len, window):
    """By trying every key against every query, so that no formula can be wrong here."""
    queries = range(kv_len - q_len, kv_len)
    seen = [j for j in range(kv_len) if any(i - window < j <= i for i in queries)]
    return seen[0], seen[-1] + 1


window = Exercise("1.5", _range, outputs=("first", "end"), tolerance=0.0)
window.case("three queries at 7, 8 and 9, window 4", q_len=3, kv_len=10, window=4)
window.case("decode", q_len=1, kv_len=10, window=3)
window.case("a window longer than the sequence", q_len=2, kv_len=6, window=100)
window.case("the window begins exactly at the first token", q_len=3, kv_len=10, window=8)
window.case("every token sees only itself", q_len=3, kv_len=9, window=1)
window.case("a whole prompt", q_len=12, kv_len=12, window=4)


@window.mistake("the window is counted back from the last query: the first one looks farther back")
def _from_the_last(q_len, kv_len, window):
    return max(0, kv_len - window), kv_len


@window.mistake("a query sees window keys besides itself: its own key is one of them")
def _one_more(q_len, kv_len, window):
    return max(0, kv_len - q_len - window), kv_len


@window.mistake("a query sees only window - 1 keys: an offset is one too large")
def _one_less(q_len, kv_len, window):
    return max(0, kv_len - q_len - window + 2), kv_len


@window.mistake("first is negative where the window reaches past the beginning; it must stop at 0")
def _negative(q_len, kv_len, window):
    return kv_len - q_len - window + 1, kv_len


@window.mistake("end is the last key itself: like Python's ranges, it stands one past it")
def _end_included(q_len, kv_len, window):
    return max(0, kv_len - q_len - window + 1), kv_len - 1


@window.mistake("end is first + window: there ends what the first query sees, and others see more")
def _end_of_the_first(q_len, kv_len, window):
    first, end = _range(q_len, kv_len, window)
    return first, min(end, first + window)


@window.mistake("the cached prefix is ignored: the first query is taken to stand at position 0")
def _no_prefix(q_len, kv_len, window):
    return 0, kv_len
