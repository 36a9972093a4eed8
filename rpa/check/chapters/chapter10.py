"""Checks of chapter 10: blocks under a budget, and the time of a pipeline.

References and mistakes are NumPy and plain Python.
"""

import numpy as np

from rpa.check.exercise import Exercise
from rpa.paging import cdiv

# 10.1 blocks under a budget -----------------------------------------------------------------------

TOKEN_BYTES, ROW_BYTES, STATE_BYTES, SCORE_BYTES = 4096, 8192, 49_152, 24
BYTES_A_CYCLE, PAIRS_A_CYCLE, STEP_CYCLES = 500, 8, 300


def _vmem(bq, bkv, buffers=2, with_state=True, with_scores=True, q_buffers=None):
    kv, q_and_o = buffers * TOKEN_BYTES * bkv, (q_buffers or 2 * buffers) * ROW_BYTES * bq
    return kv + q_and_o + with_state * STATE_BYTES * bq + with_scores * SCORE_BYTES * bq * bkv


def _steps(q_len, kv_len, bq, bkv, causal=True):
    """KV blocks that the query blocks visit, all together."""
    return sum(cdiv(end if causal else kv_len, bkv) for end in _ends(q_len, kv_len, bq))


def _ends(q_len, kv_len, bq):
    """Where each query block ends, in positions of its sequence."""
    return [kv_len - q_len + min(end, q_len) for end in range(bq, q_len + bq, bq)]


def _cycles(q_len, kv_len, bq, bkv, **options):
    steps = _steps(q_len, kv_len, bq, bkv, **options)
    return _time(steps, q_len, bq, bkv)


def _time(steps, q_len, bq, bkv, kv_tokens=None):
    """Cycles of a chunk; K and V of `kv_tokens` are read, by default a block a step."""
    kv_tokens = steps * bkv if kv_tokens is None else kv_tokens
    hbm = (kv_tokens * TOKEN_BYTES + 2 * q_len * ROW_BYTES) / BYTES_A_CYCLE
    return max(hbm, steps * bq * bkv / PAIRS_A_CYCLE) + STEP_CYCLES * steps


def _best(candidates, fits, cost):
    return min((pair for pair in candidates if fits(*pair)), key=lambda pair: cost(*pair))


def _choose(candidates, q_len, kv_len, vmem_budget_bytes):
    return _best(
        candidates,
        lambda bq, bkv: _vmem(bq, bkv) <= vmem_budget_bytes,
        lambda bq, bkv: _cycles(q_len, kv_len, bq, bkv),
    )


MIB = 2**20
PAIRS = [(bq, bkv) for bq in (16, 32, 64, 128, 256) for bkv in (128, 256, 512, 1024, 2048)]
"""What there is to choose from; some of it does not fit, some is slow."""


def _job(q_len, kv_len, budget_mib, candidates=PAIRS):
    return {
        "candidates": candidates,
        "q_len": q_len,
        "kv_len": kv_len,
        "vmem_budget_bytes": int(budget_mib * MIB),
    }


choose_blocks = Exercise("10.1", _choose, outputs=("bq", "bkv"), convert=np.array, tolerance=0.0)
choose_blocks.case("one pair fits", **_job(128, 1024, 8, [(128, 512), (16, 128)]))
choose_blocks.case("both fit", **_job(128, 1024, 64, [(128, 512), (16, 128)]))
choose_blocks.case("a chunk in plenty of VMEM", **_job(512, 4096, 64))
choose_blocks.case("a chunk in 16 MiB", **_job(512, 4096, 16))
choose_blocks.case("a chunk in 20 MiB", **_job(512, 4096, 20))
choose_blocks.case("a short chunk", **_job(48, 1000, 12))
choose_blocks.case("a fresh prompt", **_job(1024, 1024, 40))
choose_blocks.case("a long context", **_job(256, 16384, 6))
choose_blocks.case("a chunk that is no whole number of blocks", **_job(300, 1000, 16))
choose_blocks.case("a chunk of one block", **_job(16, 1500, 12))
choose_blocks.case("a budget that is just enough", **_job(128, 1024, 15.5, [(128, 512), (16, 128)]))
choose_blocks.case("two that are alike", **_job(16, 128, 64, [(32, 128), (16, 128)]))


def _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, cost=None, **vmem):
    return _best(
        candidates,
        lambda bq, bkv: _vmem(bq, bkv, **vmem) <= vmem_budget_bytes,
        cost or (lambda bq, bkv: _cycles(q_len, kv_len, bq, bkv)),
    )


@choose_blocks.mistake("VMEM is not asked: the pair does not fit")
def _without_budget(candidates, q_len, kv_len, vmem_budget_bytes):
    return _choose_with(candidates, q_len, kv_len, np.inf)


@choose_blocks.mistake(
    "every buffer is there once: KV, queries and output need two, one to compute on and one that "
    "is on its way"
)
def _one_buffer(candidates, q_len, kv_len, vmem_budget_bytes):
    return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, buffers=1)


@choose_blocks.mistake("queries and output are counted once: each of the two has two buffers")
def _queries_or_output(candidates, q_len, kv_len, vmem_budget_bytes):
    return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, q_buffers=2)


@choose_blocks.mistake("the state of the softmax takes no VMEM: it is 48 KiB a query token")
def _no_state(candidates, q_len, kv_len, vmem_budget_bytes):
    return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, with_state=False)


@choose_blocks.mistake(
    "scores and weights take no VMEM: 24 bytes for each pair of tokens of a tile"
)
def _no_scores(candidates, q_len, kv_len, vmem_budget_bytes):
    return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, with_scores=False)


@choose_blocks.mistake(
    "the pair that fills VMEM most is taken: what is asked for is the least time, and what fits is "
    "not yet fast"
)
def _largest(candidates, q_len, kv_len, vmem_budget_bytes):
    cost = lambda bq, bkv: -_vmem(bq, bkv)  # noqa: E731
    return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, cost)


@choose_blocks.mistake(
    "every query block reads up to kv_len: the early ones of a chunk end sooner, and large KV "
    "blocks then fetch and compute what no query sees"
)
def _not_causal(candidates, q_len, kv_len, vmem_budget_bytes):
    cost = lambda bq, bkv: _cycles(q_len, kv_len, bq, bkv, causal=False)  # noqa: E731
    return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, cost)


@choose_blocks.mistake(
    "HBM and products are added: they overlap, so of the two only the longer one counts"
)
def _added_times(candidates, q_len, kv_len, vmem_budget_bytes):
    def cost(bq, bkv):
        steps = _steps(q_len, kv_len, bq, bkv)
        hbm = steps * bkv * TOKEN_BYTES + 2 * q_len * ROW_BYTES
        return hbm / BYTES_A_CYCLE + steps * (bq * bkv / PAIRS_A_CYCLE + STEP_CYCLES)

    return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, cost)


def _wrong_time(words, time):
    """A mistake of the model of time: `time(steps, q_len, kv_len, bq, bkv)` in cycles."""

    def choose(candidates, q_len, kv_len, vmem_budget_bytes):
        def cost(bq, bkv):
            return time(_steps(q_len, kv_len, bq, bkv), q_len, kv_len, bq, bkv)

        return _choose_with(candidates, q_len, kv_len, vmem_budget_bytes, cost)

    choose_blocks.mistake(words)(choose)


_wrong_time(
    "K and V are read once, for all query blocks together: each query block reads them again, and "
    "so larger ones save bytes",
    lambda steps, q_len, kv_len, bq, bkv: _time(steps, q_len, bq, bkv, cdiv(kv_len, bkv) * bkv),
)
_wrong_time(
    "HBM is left out: with few queries a block it takes longer than the products",
    lambda steps, q_len, kv_len, bq, bkv: _time(steps, 0, bq, bkv, 0),
)
_wrong_time(
    "the products are left out: with many queries a block they take longer than HBM",
    lambda steps, q_len, kv_len, bq, bkv: _time(steps, q_len, 0, bkv),
)
_wrong_time(
    "the ends of the steps are left out: 300 cycles each",
    lambda steps, q_len, kv_len, bq, bkv: _time(steps, q_len, bq, bkv) - STEP_CYCLES * steps,
)
_wrong_time(
    "the cached tokens are forgotten: a query block ends at kv_len - q_len + min(end, q_len)",
    lambda _, q_len, kv_len, bq, bkv: _time(_steps(q_len, q_len, bq, bkv), q_len, bq, bkv),
)
_wrong_time(
    "blocks are counted by rounding down: a KV block that is begun is a step, too",
    lambda _, q_len, kv_len, bq, bkv: _time(
        sum(end // bkv for end in _ends(q_len, kv_len, bq)), q_len, bq, bkv
    ),
)
_wrong_time(
    "HBM moves the tokens that are seen: every step reads a whole KV block",
    lambda steps, q_len, kv_len, bq, bkv: _time(
        steps, q_len, bq, bkv, sum(_ends(q_len, kv_len, bq))
    ),
)
_wrong_time(
    "queries or output are left out of the bytes: both cross the HBM once",
    lambda steps, q_len, kv_len, bq, bkv: _time(steps, q_len / 2, bq, bkv),
)
_wrong_time(
    "the last query block goes on behind q_len: it ends at kv_len - q_len + min(end, q_len)",
    lambda _, q_len, kv_len, bq, bkv: _time(
        sum(cdiv(kv_len - q_len + end, bkv) for end in range(bq, q_len + bq, bq)), q_len, bq, bkv
    ),
)
_wrong_time(
    "the steps of one query block are counted: each of them visits its KV blocks",
    lambda _, q_len, kv_len, bq, bkv: _time(cdiv(kv_len, bkv), q_len, bq, bkv),
)


@choose_blocks.mistake("a pair that takes just the budget is refused: it fits, <= and not <")
def _not_quite(candidates, q_len, kv_len, vmem_budget_bytes):
    return _choose(candidates, q_len, kv_len, vmem_budget_bytes - 1)


@choose_blocks.mistake("of two alike the last one is taken")
def _last_of_alike(candidates, q_len, kv_len, vmem_budget_bytes):
    return _choose(candidates[::-1], q_len, kv_len, vmem_budget_bytes)


# 10.2 predict MBU ---------------------------------------------------------------------------------


def _blocks_of(kv_lens, block_tokens):
    """Tokens of each block, sequence after sequence."""
    return [
        min(block_tokens, kv_len - first)
        for kv_len in kv_lens.tolist()
        for first in range(0, kv_len, block_tokens)
    ]


def _clocks(tokens, copy_cycles, compute_cycles, buffers=2):
    """When each block is copied and computed: copies in a row, each into a buffer that is free."""
    copied, computed = [], []
    for n, block_tokens in enumerate(tokens):
        free = computed[n - buffers] if n >= buffers else 0
        start = max(copied[-1] if copied else 0, free)
        copied.append(start + block_tokens * copy_cycles)
        computed.append(max(copied[-1], computed[-1] if computed else 0) + compute_cycles)
    return copied, computed


def _pipeline(*arguments, **options):
    """When the last block is computed."""
    return _clocks(*arguments, **options)[1][-1]


def _mbu(kv_lens, block_tokens, copy_cycles, compute_cycles):
    tokens = _blocks_of(kv_lens, block_tokens)
    return float(sum(tokens) * copy_cycles / _pipeline(tokens, copy_cycles, compute_cycles))


def _decodes(kv_lens, block_tokens, copy_cycles, compute_cycles):
    return {
        "kv_lens": np.array(kv_lens, np.int32),
        "block_tokens": block_tokens,
        "copy_cycles": copy_cycles,
        "compute_cycles": compute_cycles,
    }


predict_mbu = Exercise("10.2", _mbu, convert=np.array, tolerance=1e-6)
predict_mbu.case("one block", **_decodes([10], 10, 1, 5))
predict_mbu.case("two blocks, HBM is slower", **_decodes([20], 10, 1, 5))
predict_mbu.case("two blocks, computing is slower", **_decodes([20], 10, 1, 15))
predict_mbu.case("a last block that is not full", **_decodes([13], 10, 1, 5))
predict_mbu.case("two sequences", **_decodes([20, 10], 10, 1, 5))
predict_mbu.case("short ones, then a long one", **_decodes([2, 2, 2, 2, 40], 20, 2, 9))
predict_mbu.case("a v5e, blocks of 1,024", **_decodes([4096, 1000, 2500], 1024, 7.5, 2000))
predict_mbu.case("a TPU7x, short sequences", **_decodes([512] * 8, 1024, 2.44, 1900))


@predict_mbu.mistake(
    "copies and computations take turns: while a block is computed, the next one is on its way"
)
def _no_overlap(kv_lens, block_tokens, copy_cycles, compute_cycles):
    tokens = _blocks_of(kv_lens, block_tokens)
    time = sum(tokens) * copy_cycles + len(tokens) * compute_cycles
    return sum(tokens) * copy_cycles / time


@predict_mbu.mistake(
    "the longer of all copies and all computations is taken: no block is computed before the first "
    "block is there, and the last one is computed when all copies are done"
)
def _roofline(kv_lens, block_tokens, copy_cycles, compute_cycles):
    tokens = _blocks_of(kv_lens, block_tokens)
    copies = sum(tokens) * copy_cycles
    return copies / max(copies, len(tokens) * compute_cycles)


@predict_mbu.mistake(
    "the copies never wait: there are two buffers, and a third copy has to wait until the first "
    "block is computed"
)
def _endless_buffers(kv_lens, block_tokens, copy_cycles, compute_cycles):
    tokens = _blocks_of(kv_lens, block_tokens)
    time = _pipeline(tokens, copy_cycles, compute_cycles, buffers=len(tokens))
    return sum(tokens) * copy_cycles / time


@predict_mbu.mistake("the last block of a sequence is copied whole: only its tokens are")
def _whole_blocks(kv_lens, block_tokens, copy_cycles, compute_cycles):
    tokens = _blocks_of(kv_lens, block_tokens)
    time = _pipeline([block_tokens] * len(tokens), copy_cycles, compute_cycles)
    return sum(tokens) * copy_cycles / time


@predict_mbu.mistake(
    "the pipeline runs empty between sequences: the first block of the next one is fetched while "
    "the last one of this is computed"
)
def _drained(kv_lens, block_tokens, copy_cycles, compute_cycles):
    each = [_blocks_of(kv_lens[i : i + 1], block_tokens) for i in range(len(kv_lens))]
    time = sum(_pipeline(tokens, copy_cycles, compute_cycles) for tokens in each)
    return sum(map(sum, each)) * copy_cycles / time


@predict_mbu.mistake("it is the time in cycles; asked is the part of it in which HBM delivers")
def _time_only(kv_lens, block_tokens, copy_cycles, compute_cycles):
    return float(_pipeline(_blocks_of(kv_lens, block_tokens), copy_cycles, compute_cycles))


@predict_mbu.mistake(
    "a block that is not full is computed in less time: the products take whole blocks, whatever "
    "is in them"
)
def _scaled_compute(kv_lens, block_tokens, copy_cycles, compute_cycles):
    copied, computed = [], []
    tokens = _blocks_of(kv_lens, block_tokens)
    for n, size in enumerate(tokens):
        start = max(copied[-1] if copied else 0, computed[n - 2] if n >= 2 else 0)
        copied.append(start + size * copy_cycles)
        share = compute_cycles * size / block_tokens
        computed.append(max(copied[-1], computed[-1] if computed else 0) + share)
    return sum(tokens) * copy_cycles / computed[-1]


def _wrong_mbu(words, mbu):
    """A mistake in the end: `mbu(copying, time, tokens, copy_cycles, compute_cycles)`."""

    def predict(kv_lens, block_tokens, copy_cycles, compute_cycles):
        tokens = _blocks_of(kv_lens, block_tokens)
        time = _pipeline(tokens, copy_cycles, compute_cycles)
        return mbu(sum(tokens) * copy_cycles, time, tokens, copy_cycles, compute_cycles)

    predict_mbu.mistake(words)(predict)


_wrong_mbu(
    "there are three buffers: with two, a copy waits until the block before the last is computed",
    lambda copying, time, tokens, *cycles: copying / _pipeline(tokens, *cycles, buffers=3),
)
_wrong_mbu(
    "the time ends with the last copy: the last block is still to be computed then",
    lambda copying, time, tokens, *cycles: copying / _clocks(tokens, *cycles)[0][-1],
)
_wrong_mbu(
    "it is the part of the time in which the core computes; asked is that of the HBM",
    lambda copying, time, tokens, copy_cycles, compute_cycles: len(tokens) * compute_cycles / time,
)
_wrong_mbu(
    "the fraction is upside down: MBU is at most 1",
    lambda copying, time, tokens, copy_cycles, compute_cycles: time / copying,
)


_wrong_mbu(
    "it is a percentage; asked is a part between 0 and 1",
    lambda copying, time, tokens, copy_cycles, compute_cycles: 100 * copying / time,
)
_wrong_mbu(
    "a block is computed as soon as it has arrived: the one before it has to be computed first",
    lambda copying, time, tokens, *cycles: copying / _impatient(tokens, *cycles),
)


def _impatient(tokens, copy_cycles, compute_cycles):
    """When the last block is computed if none waits for the computation of the one before."""
    copied, computed = [0, 0], [0, 0]
    for size in tokens:
        copied.append(max(copied[-1], computed[-2]) + size * copy_cycles)
        computed.append(copied[-1] + compute_cycles)
    return computed[-1]


@predict_mbu.mistake("every block has block_tokens tokens: the last of a sequence has what is left")
def _all_full(kv_lens, block_tokens, copy_cycles, compute_cycles):
    whole = -(-kv_lens // block_tokens) * block_tokens
    return _mbu(whole, block_tokens, copy_cycles, compute_cycles)


@predict_mbu.mistake("computing takes compute_cycles for each token; it does for each block")
def _compute_a_token(kv_lens, block_tokens, copy_cycles, compute_cycles):
    cycles = copy_cycles, compute_cycles * block_tokens
    return _scaled_compute(kv_lens, block_tokens, *cycles)


@predict_mbu.mistake("blocks go on over the end of a sequence: each sequence begins a new one")
def _across_sequences(kv_lens, block_tokens, copy_cycles, compute_cycles):
    return _mbu(kv_lens.sum(keepdims=True), block_tokens, copy_cycles, compute_cycles)
