# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 10: Blocks, pipelines, predictions
#
# **Time:** 25 minutes to read and run, about 35 minutes for the exercises.
#
# **You need:** chapters 8 and 9: the kernel, and what bounds its inner loop. No TPU.
#
# **You will be able to:** choose block sizes, and say what they cost; say how far copies must run
# ahead of the products; and predict, in numbers, how much of a chip's bandwidth a batch will use.
#
# Chapter 9 made the inner loop short. A batch is thousands of its iterations, with copies under way
# meanwhile, and ends between them.

# %%
import jax.numpy as jnp
import numpy as np

from rpa import chips
from rpa.figures import optimise as pictures
from rpa.figures import show_source
from rpa.kernel import blocks, cases
from rpa.kernel.plan import Plan
from rpa.kernel.problem import Problem
from rpa.lab.bench import comparison, tune
from rpa.lab.schedule.recorded import recorded

CHIPS = ("v5e", "v6e", "tpu7x")

# %% [markdown]
# ## 1. How large should the blocks be?
#
# Four numbers, (bq, bkv, bq_c, bkv_c): what is fetched together, and what is multiplied together.
# Larger blocks have fewer ends; they cost VMEM, and short sequences waste what they do not fill.
# The kernel knows its chip and asks for no tuning:

# %%
show_source(blocks.default_block_sizes)

# %%
bf16 = np.dtype(jnp.bfloat16)
llama = Problem(*(575, 32, 8, 128), *(32768, 16, 64, 512), *(bf16, bf16, bf16))


def plan_for(case, max_q_len, sizes=None):
    chosen = sizes or blocks.default_block_sizes(llama, case, max_q_len)
    plan = Plan(llama, case, chosen, max_q_len, vmem_limit_bytes=64 * 2**20)
    return blocks.plan_ahead(plan)


for case, max_q_len in cases.cases_of(512):
    plan = plan_for(case, max_q_len)
    total = sum(blocks.vmem_bytes(plan).values())
    print(f"{case.label:8} {plan.blocks}, {total / 2**20:.1f} MiB")

# %% [markdown]
# Where do the MiB of a mixed kernel go?

# %%
plan = plan_for(*cases.cases_of(None)[-1])
for name, size in sorted(blocks.vmem_bytes(plan).items(), key=lambda item: -item[1]):
    print(f"  {name:10} {size / 2**20:5.2f} MiB")

# %% [markdown]
# What is too large says so, and what to shrink, before anything is compiled:

# %%
too_large = blocks.BlockSizes(1024, 8192, 1024, 2048)
try:
    blocks.check_fits("m_block_sizes", plan_for(*cases.cases_of(None)[-1], too_large))
except ValueError as error:
    print(str(error).split(" (MiB")[0])

# %% [markdown]
# Is larger better, where it fits? `make tune` sweeps the blocks of a decode on a TPU7x and keeps
# what it predicts:

# %%
swept = tune.read()["tpu7x llama-3-8b decode"]
small_us, large_us = (swept[f"1,{bkv},1,512"]["at peak"] for bkv in (1024, 2048))
for name, time_us in small_us.items():
    print(f"{name:20} in KV blocks of 1,024 {time_us:5.0f} us, of 2,048 {large_us[name]:5.0f} us")
assert large_us["64 of real lengths"] > small_us["64 of real lengths"]

# %% [markdown]
# Larger blocks have half as many ends. Long contexts gain nothing from it as long as HBM is slower
# anyway, and a batch of real lengths loses, because the shorter of two sequences waits. No default
# can know your lengths: a server that knows better passes `d_block_sizes=(1, 2048, 1, 512)`.
#
# **Takeaway.** The budget says what is possible; lengths say what is good. Exercise 10.1 chooses.

# %% [markdown]
# ## 2. From bundles to a time
#
# Copies run while bundles issue, as long as there are two buffers. Three blocks on a TPU7x, 1,024
# tokens each, 2,494 cycles of HBM, and about 1,700 to compute:


# %%
def hbm_cycles(chip, num_tokens=512, token_bytes=4096):
    c = chips.chip(chip)
    return c.cycles(num_tokens * token_bytes / c.hbm_bytes_per_s)


# %%
def double_buffer(copy_cycles, compute_cycles, num_blocks):
    """(start, end) of each copy and of each computation."""
    copies, computes = [(0, 0)] * 2, [(0, 0)] * 2
    for _ in range(num_blocks):
        start = max(copies[-1][1], computes[-2][1])  # a buffer has to be free
        copies.append((start, start + copy_cycles))
        start = max(copies[-1][1], computes[-1][1])  # the block has to be there
        computes.append((start, start + compute_cycles))
    return copies[2:], computes[2:]


copies, computes = double_buffer(2494, 1700, num_blocks=3)
pictures.two_lanes(copies, computes)

# %% [markdown]
# HBM never stops; the core waits, and only the last computation has nothing to hide behind. So the
# **MBU** (memory bandwidth utilisation: the least bytes, at the peak, over the time) is
# 3 x 2,494 / 9,182 = 81 %, and comes near 100 % for a batch of a hundred. Swap the two numbers,
# and HBM waits for the core:

# %%
for copy_cycles, compute_cycles in [(2494, 1700), (1700, 2494)]:
    for num_blocks in (3, 100):
        _, computes = double_buffer(copy_cycles, compute_cycles, num_blocks)
        mbu = num_blocks * copy_cycles / computes[-1][1]
        print(f"copy {copy_cycles:,}, compute {compute_cycles:,}, {num_blocks:3} blocks: {mbu:.0%}")
assert round(hbm_cycles("tpu7x", 1024)) == 2494
assert 1600 < recorded("kernels")["tpu7x"]["decode"]["step_1024"] < 1800

# %% [markdown]
# The lab does this with everything in it: the kernel's scalar instructions are *executed* with the
# lengths of your batch, each bundle is counted as often as it is passed, each copy starts in the
# cycle in which the kernel starts it (`rpa.lab.predict`). The 16 decodes of chapter 9, one layer of
# Llama 3 8B:

# %%
found = comparison.recorded()
rows = [row for row in found["rows"] if row["name"] in ("streamed", "fused", "kernel")]
for row in rows:
    name = row["name"]
    mbu = {chip: found["least_us"][chip] / row["time_us"][chip] for chip in CHIPS}
    print(f"{name:9}", ", ".join(
        f"{chip} {row['time_us'][chip]:4.0f} us, MBU {mbu[chip]:4.0%}" for chip in CHIPS
    ))  # fmt: skip
assert mbu["v5e"] > mbu["v6e"] > mbu["tpu7x"] > 0.5

# %% [markdown]
# All of that is predicted, with every copy at peak bandwidth, and there when its share of it is
# over. A real copy takes longer to arrive, however short it is: with 1.0 us, and 1.2 cycles per
# bundle, the published timings of the peers on a TPU7x are met best. So copies have to start early.
# How early? In our pipeline, with blocks of two short sequences, 512 tokens each: the copies of an
# iteration start when the iteration `ahead` before it begins.

# %%
from rpa.lab.predict.calibration import FITTED

copy_cycles, compute_cycles = hbm_cycles("tpu7x", 1024), 2400 * FITTED.cycles_per_bundle
latency_cycles = FITTED.latency_us * 1e-6 * chips.chip("tpu7x").clock_hz


# %%
def cycles_per_iteration(ahead, num_iterations=200):
    """What an iteration takes, if HBM takes one copy after the other and each arrives late."""
    ends, hbm_free = [0], 0
    for iteration in range(num_iterations):
        hbm_free = max(hbm_free, ends[max(0, iteration - ahead)]) + copy_cycles
        ends.append(max(hbm_free + latency_cycles, ends[-1]) + compute_cycles)
    return ends[-1] / num_iterations


# %%
for ahead in (1, 2, 3, 4):
    cycles = cycles_per_iteration(ahead)
    print(f"{ahead} ahead: {cycles:5,.0f} cycles per iteration, MBU {copy_cycles / cycles:4.0%}")
double_buffer = cycles_per_iteration(1)
assert double_buffer > 1.3 * cycles_per_iteration(2) and double_buffer > 1.5 * copy_cycles

# %% [markdown]
# One iteration ahead is a double buffer. HBM idles for more than a third of the time, although
# neither the copies nor the products take as long as an iteration does. Two ahead, the products
# never stop: what is in flight lasts for a latency and a computation. The kernel runs three
# iterations ahead in decode (`tricks.DECODE_ITERATIONS_AHEAD`), because its iterations are not all
# alike: by the fit of that time its HBM was busy for 62 % of the time before, and for 91 % since
# (`docs/ablations.md`).
#
# Where the model is wrong, and by how much, is measured against published timings of real TPUs
# (`python -m rpa lab predict --published`); on a TPU you have your own, with `python -m rpa bench`.
#
# **Takeaway.** Time is a pipeline of copies and bundles, and a pipeline has to be long enough: what
# is on its way must last for a latency and a computation. Exercise 10.2 writes the small version.

# %% [markdown]
# ## What is still slow
#
# Everything predicted, by schedule, as above.

# %%
for chip in CHIPS:
    one = recorded("kernels")[chip]["decode"]
    hbm = hbm_cycles(chip, 1024)
    print(f"{chip:6} 1,024 tokens of decode: {one['executed_per_chunk']:5,.0f} bundles in a long "
          f"sequence, {one['step_1024']:5,.0f} as one of its own; HBM {hbm:5,.0f}")  # fmt: skip
    assert one["executed_per_chunk"] < one["step_1024"] < hbm

# %% [markdown]
# - **Short sequences on a fast chip.** A sequence costs some 200 bundles besides its tokens, and a
#   block has ends. From 1,024 tokens on HBM is slower by far, even on a TPU7x; at 512 by a little.
#   So the batch of section 2 uses nearly all of a v5e's bandwidth, and less of the faster chips'.

# %%
for chip in CHIPS:
    per_sequence_bundles = recorded("kernels")[chip]["decode"]["per_sequence"]
    tokens = per_sequence_bundles / hbm_cycles(chip, 1)
    print(f"{chip:6} besides its tokens a sequence takes {per_sequence_bundles:3.0f} bundles, in "
          f"which HBM delivers {tokens:3.0f} tokens")  # fmt: skip
    assert 100 < per_sequence_bundles < 300
assert mbu["v5e"] > 0.95

# %% [markdown]
# - **Small pages.** A copy takes the same few bundles to issue, whether its page has 128 tokens or
#   16, and so eight times as many with pages of 16. A block whose pages are all neighbours is one
#   copy (`table`); shorter runs travel page by page.
# - **The ends of a block** in a prefill: until the first K is in place, and in the last softmax.

# %%
for chip in CHIPS:
    kernel = recorded("kernels")[chip]
    issue, mixed = kernel["decode"]["page_issue_per_chunk"], kernel["mixed"]
    rest = 1 - mixed["floor"] / mixed["interior_region"]
    print(f"{chip:6} decode, 1,024 tokens: {issue:2.0f} bundles issue pages of 128, and "
          f"{8 * issue:3.0f} pages of 16; prefill: {rest:3.0%} besides MATMUL")  # fmt: skip

# %% [markdown]
# - **Few bytes per token.** With one KV head per chip (Llama 3 70B on eight), or with heads of 64,
#   a TPU7x needs more bundles for a block than HBM has cycles (`docs/ablations.md`). MATPUSH again:
#   K and V are weights for a few rows, and to turn keys does not pay in a dot of so few lanes.
# - **Windows.** With a sliding window of 128, reading and computing take hardly more than the least
#   on a v5e and far more on a TPU7x: there are not enough tokens to hide anything behind.
# - **And what no schedule holds**: launching, instruction fetch, and how HBM really behaves. That
#   takes a TPU.
#
# **Chapter 11** takes the kernel to where it is used, with windows, sinks, caches in float8 and
# 256K tokens, and shows what goes wrong there. **Chapter 12** puts the numbers of all rungs and of
# the peers on one page, and the items above on the list of what is open: the shortest schedule
# wins.
#
# **Before you go on:** do [the exercises of this chapter](../exercises/10_tuning.ipynb).
#
# **Read more:**
#
# - [All about Transformer inference](https://jax-ml.github.io/scaling-book/inference), chapter 7
#   of the scaling book: from a kernel's bytes to a server's throughput.
# - [Roofline](https://doi.org/10.1145/1498765.1498785), Williams, Waterman and Patterson 2009:
#   the bound that a prediction is held against.
