# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 12: The comparison
#
# **Time:** 25 minutes to read and run, about 60 minutes for the exercises; the last of them is
# open.
#
# **You need:** chapters 4 to 10, and chapter 11 if a server waits for your kernel. No TPU; with
# one, everything is timed as well.
#
# **You will be able to:** put eight rungs, your own kernel and three others on one page, in lines,
# bytes and microseconds; say which of these numbers is counted, which predicted and which measured;
# and name what is not solved yet.
#
# You have climbed a ladder. From up here one can look down, and sideways: at the kernels that serve
# real users today.

# %%
import jax

from rpa import chips
from rpa.figures import comparison as pictures
from rpa.figures import show_source
from rpa.lab.bench import comparison, on_device
from rpa.lab.copies import traffic
from rpa.lab.schedule import NoSchedule

# %% [markdown]
# ## 1. What is compared?
#
# A comparison is fair if every kernel does the same work. Ours is one step of a server: 16 decodes
# of real lengths (chapter 2), one layer of Llama 3 8B in bfloat16, pages of 128 tokens that lie
# anywhere in the cache, and room for 16,384 tokens per sequence, as a server keeps it. Each kernel
# chooses its own blocks.

# %%
batch = comparison.decode_step()
print("kv_lens:", batch.kv_lens.tolist())
print(f"{batch.kv_lens.sum():,} tokens; the longest is {batch.kv_lens.max():,}")

# %% [markdown]
# How fast could it be? By hand: 26,776 tokens of 4 KiB are 110 MB, and a v5e moves 819 GB per
# second:
# 134 us. No kernel can beat that, because it has to read every token once.

# %%
least_bytes = sum(traffic.least(batch, comparison.LAYER).values())
for chip in comparison.CHIPS:
    print(f"{chip:6} at least {comparison.hbm_us(least_bytes, chip):6.1f} us")
assert round(comparison.hbm_us(26_776 * 4096, "v5e")) == 134

# %% [markdown]
# **Takeaway.** Say what is raced before you say who wins: lengths, pages, dtype, blocks, and the
# time that no kernel can beat.

# %% [markdown]
# ## 2. Who moves how much?
#
# The first number is counted, not predicted: HBM bytes, from the kernel's own copies (chapter 8
# did it for rung 8). Two rungs, as they are on this machine:

# %%
moved = {name: traffic.count(name, batch, comparison.LAYER) for name in ("dense", "streamed")}
for name, counted in moved.items():
    ratio = counted.num_bytes / least_bytes
    print(f"{name:9} {counted.num_bytes / 1e6:6.1f} MB, {ratio:.2f} times the least")

# %% [markdown]
# Rung 1 pads every sequence to the longest, 4,109 tokens: 2.4 times too much. The other rungs, and
# three kernels of other people, were counted in the same way by one command, and kept:
#
#     python -m rpa lab compare --record
#
# What it wrote is in the package. Is it still true? For these two rungs we can tell:

# %%
found = comparison.recorded()
rows = {row["name"]: row for row in found["rows"]}
for name, counted in moved.items():
    assert rows[name]["num_bytes"] == counted.num_bytes
print("recorded with", ", ".join(f"{name} {v}" for name, v in found["versions"].items()))

# %% [markdown]
# ## 3. The ladder
#
# The second number is predicted: the microseconds of the compiled schedule, with its waits for the
# HBM (chapter 9). The third needs no machine at all: lines of code, without comments and
# docstrings, that a reader has to read.

# %%
print(comparison.table(found))

# %%
pictures.ladder(found)

# %% [markdown]
# The row *yours* is the file that grew in chapters 4 to 7, as the reference solutions have it, so
# that the record does not depend on who reads it. What does *your* file say? Its lines and bytes
# take a moment; its time takes a compiler:
# `python -m rpa lab predict --kernel my_rpa.py:ragged_attention`.

# %%
from rpa.yours import LINE, earlier, yours_path

mine, path = earlier(LINE["7.3"]), yours_path()
if path is not None and path.is_file():
    print(f"{path.name}: {comparison.count_code(path.read_text('utf-8'))} lines of code")
counted = traffic.count(mine, batch, comparison.LAYER)
print(f"yours moves {counted.num_bytes / least_bytes:.2f} times the least")

# %% [markdown]
# Read it from above. Rungs 1 to 3 are plain JAX, so there is no schedule and no bar; the words say
# what their bytes alone would take. Rung 1 pads, rungs 2 and 3 pass over the pages twice, for the
# scores and for the mix. Rung 4 gathers the whole room of every sequence before it attends, and
# then the tiles read it again: good at tiles, bad at pages. **From rung 5 on the bytes are right.**
# And yet rung 5 is nowhere near the dotted line. What is it doing there?

# %%
for name in ("streamed", "fused", "yours", "kernel", "v3"):
    bundles = rows[name]["bundles"]
    parts = [f"{c} {bundles[c] / chips.chip(c).clock_hz * 1e6:6.1f}" for c in comparison.CHIPS]
    print(f"{rows[name]['title']:11} us of bundles alone: {', '.join(parts)}")
rung5_over_hbm = {
    c: rows["streamed"]["bundles"][c] / chips.chip(c).clock_hz * 1e6 / found["least_us"][c]
    for c in comparison.CHIPS
}
assert 3.5 < rung5_over_hbm["v5e"] < 4.5 and 9 < rung5_over_hbm["tpu7x"] < 11

# %% [markdown]
# Its bundles take four times as long as the HBM on a v5e, ten times on a TPU7x: one head after the
# other, short products, masks everywhere. Yours is in the same place, for the same reasons: its
# copies are right, and its arithmetic is that of chapters 4 and 5. That is what chapter 9 took
# away: rung 8 issues about a tenth of rung 5's bundles for the same copies.

# %%
over = {}
for chip in comparison.CHIPS:
    rung5, ours, v3 = (rows[name]["time_us"][chip] for name in ("streamed", "kernel", "v3"))
    over[chip] = v3 / ours
    print(f"{chip:6} {rung5 / ours:.1f} times as fast as rung 5, "
          f"{over[chip]:.2f} times as fast as v3 (predicted)")  # fmt: skip
    assert rows["kernel"]["bundles"][chip] < 0.12 * rows["streamed"]["bundles"][chip]
assert min(over.values()) > 1

# %% [markdown]
# **Takeaway.** Bytes decide who may win: until rung 5 the ladder is about them. Bundles decide who
# does: the same bytes, and times that lie far apart.

# %% [markdown]
# ## 4. Can you check it?
#
# A number that only its author can make is an advertisement. So make one here: rung 5, compiled for
# a v5e that is not there. Where libtpu is absent, too old to show its schedule or slow in doing so,
# the record stays what it is, and the cell says so.

# %%
show_source(comparison.predict_kernel)

# %%
recorded_us = rows["streamed"]["time_us"]["v5e"]
try:
    now_us = comparison.predict(comparison.RACERS["streamed"], "v5e", batch, timeout_s=60).time_us
    print(f"now {now_us:.1f} us, recorded {recorded_us:.1f} us (predicted)")
    assert 0.8 < now_us / recorded_us < 1.25
except NoSchedule as reason:
    print(f"recorded, not run: {recorded_us:.1f} us. {str(reason)[:200]}")

# %% [markdown]
# How far is such a prediction from a real TPU? The peers have published timings of their kernels,
# and the same method predicts them: `python -m rpa lab predict --published`, table in the README.
# Their decodes come out within a fifth, most within a tenth. Their batches of four new tokens a
# sequence do not: there a real chip waits for something that the schedule does not show. No one
# should believe a prediction of that kind more than this.
#
# **Takeaway.** Predicted is a word for a method that was compared with measurements, and where the
# comparison failed, that is part of it.

# %% [markdown]
# ## 5. And prefill?
#
# A prefill waits for the matrix units. Bundles of 128 query by 512 KV tokens, all heads, next to
# the cycles of the products alone:

# %%
for row in found["prefill"]:
    ratio = row["bundles"] / row["floor"]
    print(f"{row['chip']:6} {row['title']:9} {row['bundles']:7,} bundles, floor "
          f"{row['floor']:6,.0f}: {ratio:.2f} times")  # fmt: skip
ours = {r["chip"]: r["bundles"] / r["floor"] for r in found["prefill"] if r["title"] == "8 kernel"}
assert ours["v5e"] < ours["v6e"] < ours["tpu7x"]

# %% [markdown]
# Here v6e and TPU7x have the longest way to go: their products are twice as fast, and the softmax
# between them is not.
#
# **Takeaway.** Where HBM binds, the comparison is decided; where the vector units do, it is open.

# %% [markdown]
# ## 6. What does your device say?
#
# Everything so far was counted or predicted. This cell measures. On a TPU it times every rung on 64
# sequences of 4,096 tokens; elsewhere only rungs 1 to 3 run at a speed that means anything, on a
# small model, and they compare with each other only. Exercise 12.2 is how such a time is taken.

# %%
from rpa.cli.bench import machine

workload = on_device.DEFAULTS["tpu" if jax.default_backend() == "tpu" else "cpu"]
timed = list(on_device.bench(workload, cases=["decode"]))
print(f"measured on {machine()['device']}, jax {jax.__version__}: {workload.model}")
for row in timed:
    said = f"{row.timing.median_s * 1e6:10,.1f} us" if row.timing else row.note
    print(f"{row.kernel:16}{said}")
assert any(row.timing for row in timed)

# %% [markdown]
# **Takeaway.** Three kinds of numbers, and each has its word: counted (exact), predicted (a model),
# measured (with the machine's name next to it).

# %% [markdown]
# ## What is still slow
#
# What is between rung 8 and the least, in this comparison?

# %%
for chip in comparison.CHIPS:
    least_us, ours_us = found["least_us"][chip], rows["kernel"]["time_us"][chip]
    print(f"{chip:6} rung 8 {ours_us:6.1f} us, least {least_us:6.1f} us: "
          f"{least_us / ours_us:.0%} of the HBM's peak (predicted)")  # fmt: skip
assert found["least_us"]["v5e"] > 0.95 * rows["kernel"]["time_us"]["v5e"]

# %% [markdown]
# On a v5e next to nothing is left. On a TPU7x more is, because sequences of unequal lengths are
# computed in pairs and the shorter one waits. The open problems of this kernel, each of which would
# make a chapter 11:
#
# - **Shared prompts are read by everyone who shares them.** The next table has a step in which that
#   is more than a quarter of rung 8's bytes. Reading them once needs the merge of exercise 12.4,
#   and a grid that walks over groups of sequences.
# - **Small pages.** At 16 tokens per page there are eight times as many copies to issue, each as
#   dear as one of 128. Rung 8 makes one copy of a block whose pages are all neighbours; shorter
#   runs travel page by page (exercise 12.3), and whether there are any the allocator decides.
# - **Unequal pairs.** Two decodes of very different lengths, computed together, waste the shorter
#   one's turns. Who should be paired with whom?
# - **A few new tokens per sequence**, as in speculative decoding: neither decode nor prefill, and
#   the one case in which our predictions fail.
# - **Nothing here has been timed on a TPU.** If you have one, `python -m rpa bench` is the most
#   valuable thing you can run, and an issue with its output the most valuable thing you can write.
#
# Exercise 12.5 is the first of these as a challenge, with a table of your own. This is where it
# begins:

# %%
from rpa.check.chapters import leaderboard

print(leaderboard.table([]))  # times recorded for a v5e, predicted
assert rows["kernel"]["challenge_bytes"] > 1.5 * found["challenge_least_bytes"]
read_again = 7 * 1024 * 4096  # bytes of the shared prompt, by all that read it but one
assert read_again > rows["kernel"]["challenge_bytes"] / 4
assert rows["v3"]["challenge_bytes"] < rows["kernel"]["challenge_bytes"]
assert rows["v3"]["challenge_us"]["v5e"] > rows["kernel"]["challenge_us"]["v5e"]

# %% [markdown]
# v3 moves fewer bytes in this step than rung 8, because its query blocks are larger, and still
# takes longer: bytes alone do not decide. And yours stands between two rungs of plain JAX: it
# reads the chunk's sequence once for every 32 new tokens, rung 8 for every 128. Change that first.
#
# **Before you go:** do [the exercises of this chapter](../exercises/12_comparison.ipynb). After
# them there is no chapter left, only the kernel, and it is yours.
#
# **Read more:**
#
# - [FlashInfer](https://arxiv.org/abs/2501.01005), Ye et al. 2025: ragged paged attention on
#   GPUs, its schedule and its options.
# - [Cascade inference](https://flashinfer.ai/2024/02/02/cascade-inference.html): a shared prompt
#   read once, by the merge of exercise 12.4.
