# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Chapter 9: The inner loop
#
# **Time:** 45 minutes to read and run, about 65 minutes for the exercises.
#
# **You need:** chapters 1, 4, 5 and 8: the roofline, tiles and the online softmax, the double
# buffer, the rooms of rung 8. No TPU.
#
# **You will be able to:** read what a TPU does in each cycle, and say what binds; say why a decode
# and a prefill want opposite things; take a kernel from 11,318 bundles to 763 in seven steps, and
# give the reason for each; and say what each step from rung 7 to rung 8 is worth in the whole
# kernel, on three chips.
#
# Chapter 8 ended with a kernel that is right and moves no byte too many. What is left is what
# happens *between* the copies. The compiler has written all of that down.

# %%
import jax.numpy as jnp
import numpy as np

# %%
from rpa import chips
from rpa.figures import optimise as pictures
from rpa.figures import show_source
from rpa.kernel import mxu, refs
from rpa.kernel.decode import Decode
from rpa.kernel.mixed import Tiled
from rpa.lab.bench import comparison
from rpa.lab.copies import traffic
from rpa.lab.schedule import NoSchedule, inner_loop
from rpa.lab.schedule.recorded import Occupancy, compile_step, recorded, recorded_step

CHIPS = ("v5e", "v6e", "tpu7x")

# %% [markdown]
# ## 1. What does a chip do in a cycle?
#
# A TPU core issues one **bundle** per cycle, in order. A bundle has **slots**: so many for the
# matrix units, so many for vector arithmetic, for loads, for stores. The compiler fills them in
# advance, so its listing is a timetable. Four bundles by hand, of a core with one MATMUL slot and
# four VALU slots:

# %%
by_hand = np.array([[1, 0], [0, 4], [0, 4], [1, 1]])  # [bundle, unit]: slots used
capacity = np.array([1, 4])  # MATMUL, VALU
print("share of the slots used:", (by_hand.sum(axis=0) / (capacity * len(by_hand))).tolist())

# %% [markdown]
# VALU uses 9 of 16 slots, MATMUL 2 of 4, and yet it takes four cycles: in none of them are both
# full. They wait for each other. Three things can bind a loop:
#
# - **a unit**: it uses 80 % of its slots or more. Give it less to do;
# - **latency**: no unit is full, because all of them wait for results. Give them more independent
#   work;
# - **HBM**, which is not in the listing: copies run next to it, and if they take longer, that is
#   the time.
#
# The whole of rung 8 has thousands of bundles. So take its heart to the bench: **one KV block of
# 512 tokens in VMEM, one query token**, 8 KV heads and 32 query heads of 128, bfloat16, no copies.
# As one would write it:

# %%
show_source(inner_loop.load_by_value)
show_source(inner_loop.in_turn)

# %% [markdown]
# The real TPU compiler runs on any Linux machine, and takes seconds for a kernel of this size. So
# here is one, live: this loop with two improvements that come in sections 3 and 4, "odd stride".
# Everything else in this chapter was recorded in the same way (`tools/record_schedules.py`, most of
# an hour on two cores); where no compiler shows its schedule, as with Colab's jax 0.7.2, this one
# is taken from the record, too.


# %%
def on_the_bench(chip, step):
    """A step of the inner loop, compiled now; or as it was recorded."""
    try:
        return compile_step(chip, step)
    except NoSchedule as reason:
        print("recorded, not compiled:", reason)
        return recorded_step(chip, step)


# %%
live = on_the_bench("v5e", "odd stride")
print(f"{live.bundles:,} bundles on a v5e, bound by {live.bound}; as recorded with libtpu", end=" ")
print(f"{recorded('versions')['libtpu']}: {recorded_step('v5e', 'odd stride').bundles:,}")
for unit, slots in live.slots.items():
    print(f"  {unit:8} {slots:6,} slots, {live.capacity[unit]} per bundle: {live.share[unit]:4.0%}")
assert live.bound == "latency"

# %% [markdown]
# **Takeaway.** Count bundles, then ask which unit is full. If none is, it is latency. The
# compiler's listing says both, without a TPU. Exercise 9.1.

# %% [markdown]
# ## 2. What should bind?
#
# Before one makes a loop shorter: how short may it be? Three floors under 512 tokens of a decode,
# by hand for a v5e:
#
# - **HBM**: 512 tokens of 4,096 bytes, 547 bytes per cycle: 3,836 cycles.
# - **MATPUSH**: an MXU multiplies rows with *weights* that it must have taken in before. K and V
#   are weights here, 2 x 8 heads x 512 x 128 numbers, and a few rows of queries use each of them
#   once. The compiler's listing has 3,072 such slots, 4 per bundle: 768 cycles.
# - **MATMUL**: the rows that go through, 1,024 slots, 4 per bundle: 256 cycles.


# %%
def hbm_cycles(chip, num_tokens=512, token_bytes=4096):
    c = chips.chip(chip)
    return c.cycles(num_tokens * token_bytes / c.hbm_bytes_per_s)


for chip in CHIPS:
    one = recorded_step(chip, "odd stride")
    least = {unit: one.slots[unit] / one.capacity[unit] for unit in ("MATPUSH", "MATMUL")}
    print(f"{chip:6} HBM {hbm_cycles(chip):5,.0f} cycles, MATPUSH {least['MATPUSH']:4.0f}, "
          f"MATMUL {least['MATMUL']:4.0f}; the loop as it is: {one.bundles:,}")  # fmt: skip
    assert hbm_cycles(chip) > least["MATPUSH"] > least["MATMUL"]
v5e_slots = recorded_step("v5e", "odd stride").slots
assert (v5e_slots["MATPUSH"], v5e_slots["MATMUL"]) == (3072, 1024)

# %% [markdown]
# So a decode *should* be bound by HBM, on every chip: its units have work for less time than that.
# It is enough if the bundles are fewer than the cycles of HBM. On a v5e that is easy. On a TPU7x,
# whose HBM is 4.5 times as fast, 1,247 cycles is all there is.
#
# A prefill is the opposite. A tile of 128 query tokens has 512 rows for each KV head; each weight
# is used 512 times, MATPUSH is nothing, and MATMUL is the floor: 8,192 cycles on a v5e for 128
# query tokens x 512 keys x 8 heads, 4,096 on the other two, while HBM needs the same 3,836, 2,244
# and 1,247 as before.

# %%
for chip in CHIPS:
    mixed = recorded("kernels")[chip]["mixed"]
    print(f"{chip:6} prefill: HBM {hbm_cycles(chip):5,.0f} cycles, MATMUL {mixed['floor']:5,.0f}, "
          f"rung 8 takes {mixed['interior_region']:5,.0f}")  # fmt: skip
    assert mixed["floor"] > hbm_cycles(chip)

# %% [markdown]
# The rungs that have a schedule, under the roof of one TPU7x core, which is the hardest to feed.
# The batch is that of chapter 12: 16 decodes of real lengths. Times are those of the executed
# schedule and its waits (`rpa.lab.bench.comparison`). Rungs 1 to 3 are plain JAX, of which we read
# no schedule: they have no time here, so they have no point.

# %%
from rpa.figures.roofline import under_roof
from rpa.lab.batches import make_batch
from rpa.lab.predict.roofline import Point
from rpa.ladder import LADDER

# %%
found = comparison.recorded()
decode_cost = chips.attention_cost(1, np.array(found["kv_lens"]), 32, 8, 128)
numbers = {rung.name: rung.number for rung in LADDER}
timed = {row["name"]: row for row in found["rows"] if row["time_us"]}
rungs = {
    f"rung {numbers[name]}": Point(decode_cost.flops, row["num_bytes"], row["time_us"]["tpu7x"])
    for name, row in timed.items()
    if name in numbers
}
slowness = {name: timed[name]["time_us"]["tpu7x"] for name in ("streamed", "fused")}
assert min(slowness.values()) > 9 * found["least_us"]["tpu7x"]
under_roof("tpu7x", rungs, title="16 decodes on a TPU7x (predicted)")

# %% [markdown]
# Look at rungs 5 and 6: they move hardly a byte more than they must, their place *across* is that
# of rung 8, and they reach a tenth of the roof. That is this chapter in one picture. And a chunk of
# 512 after 3,584 cached tokens, on a v5e, on the other side of the ridge. Rungs 4 and 8 have a
# schedule for a tile of 128 queries by 512 keys, so their time is that of 32 tiles, or of their
# bytes:

# %%
chunk_cost = chips.attention_cost(512, 4096, 32, 8, 128)
chunk = make_batch([(512, 4096)], page_size=128)
tile_bundles = {"tiled": 8 * recorded("tiled")["bundles"],  # a KV head at a time
                "kernel": recorded("kernels")["v5e"]["mixed"]["executed_per_chunk"]}  # fmt: skip
points = {}
for name, title in {"tiled": "rung 4", "kernel": "rung 8"}.items():
    num_bytes = traffic.count(name, chunk, comparison.LAYER).num_bytes
    points[title] = (num_bytes, 32 * tile_bundles[name])

# %%
v5e = chips.chip("v5e")
rungs = {}
for title, (num_bytes, bundles) in points.items():
    seconds = max(num_bytes / v5e.hbm_bytes_per_s, bundles / v5e.clock_hz)
    rungs[title] = Point(chunk_cost.flops, num_bytes, 1e6 * seconds)
under_roof("v5e", rungs, title="A chunk of 512 of 4,096 tokens on a v5e (predicted)")

# %% [markdown]
# **Takeaway.** Decode: fewer bundles than HBM has cycles; the enemies are MATPUSH and latency.
# Prefill: as few bundles as MATMUL needs; the enemies are the vector unit and spills.

# %% [markdown]
# ## 3. How do you read one head?
#
# The first version has 11,318 bundles on a v5e. What is it full of?

# %%
written, strided = (recorded_step("v5e", step) for step in ("as written", "strided loads"))
for unit in ("VALU", "load", "store", "MATMUL"):
    print(f"{unit:7} {written.slots[unit]:6,} slots; with strided loads {strided.slots[unit]:5,}")
assert written.slots["MATMUL"] == strided.slots["MATMUL"]
assert (written.bundles, strided.bundles) == (11_318, 2_530)

# %% [markdown]
# The products are the same 1,024 slots. All the rest is `kv_ref[:, head, 0]`, which reads like a
# slice and is a transpose: the last two dimensions of the block, `[2, 128]`, lie in one register
# with K and V of a head packed into the same 32-bit words, and the compiler shuffles them apart row
# by row, and runs out of registers on the way.
#
# The block has the layout of the cache, so a token is `words` rows of 128 words of 32 bits, and
# head h of all tokens is rows `h`, `h + words`, `h + 2 * words` ... of a plain matrix. A TPU can
# load every n-th row into a register in one instruction. K and V are then the low and the high
# halves of what was loaded:

# %%
show_source(inner_loop.load_strided)

# %% [markdown]
# 11,318 bundles became 2,530. Chapter 6 said why the layout interleaves K and V: one load brings
# both.
#
# **Takeaway.** A slice across a tiled dimension is a shuffle. Look at the array as the words that
# it is, and load with a stride.

# %% [markdown]
# ## 4. Why nine rows for eight heads?
#
# A register has 8 rows. VMEM lies in banks, and a load takes at most one row from each. Where do
# the 8 rows lie, if they are 8 rows apart? By hand, with 32 banks: rows 0, 8, 16, 24, 32 ... lie in
# banks 0, 8, 16, 24, and 0 again. Two in each: two loads, and something that merges them.

# %%
pictures.banks([1, 8, 9, 16])

# %%
for stride in (1, 8, 9, 12, 16, 32):
    loads, bundles = recorded("strides")["v5e"][str(stride)]
    print(f"every {stride:2} rows: {loads} loads per register, {bundles:3} bundles for 512 rows")

# %% [markdown]
# These are the compiler's loads, and 32 banks would explain all of them (exercise 9.2 counts). So
# the buffer of rung 8 has one row per token more than it needs. It is never read. Each chip may
# have its own number of banks; an odd distance meets all of them, whatever power of two they are:

# %%
show_source(refs.vmem_buffers)

# %%
for chip in CHIPS:
    even, odd = (recorded_step(chip, step) for step in ("strided loads", "odd stride"))
    print(f"{chip:6} loads {even.slots['load']:5,} and {odd.slots['load']:4,}, "
          f"bundles {even.bundles:5,} and {odd.bundles:5,}")  # fmt: skip
    assert odd.slots["load"] < 0.6 * even.slots["load"]
    assert 0.94 < odd.bundles / even.bundles < 0.97

# %% [markdown]
# Half of the loads, and only 4 or 5 % of the bundles? Loads are not what is waited for *yet*. Take
# the loop at the end of section 7, with all that comes until then, and give it the even distance
# again:

# %%
more = {}
for chip in CHIPS:
    even = recorded("even_stride_at_the_end")[chip]
    odd = recorded_step(chip, "two sequences together").bundles
    more[chip] = even / odd - 1
    print(f"{chip:6} then: {even:5,} bundles even, {odd:5,} odd, {more[chip]:+.0%}")
assert 0 < more["v5e"] < 0.1 < more["v6e"] < 0.25 < more["tpu7x"] < 0.4

# %% [markdown]
# A fifth on v6e, a third on a TPU7x; on a v5e another unit is full by then. An optimisation is
# worth what it is worth in its company; measure it there.
#
# **Takeaway.** Odd strides. An eighth of VMEM that is never read saves half of the loads.

# %% [markdown]
# ## 5. Who waits for whom?
#
# Now look at the units, over all bundles. Every row has gaps, and they are all in the same places:

# %%
pictures.before_after({"One head after the other": recorded_step("v5e", "odd stride")})

# %% [markdown]
# Eight heads, eight times the same: K goes into the MXU (MATPUSH), four rows go through (MATMUL),
# the softmax has a maximum, an exponential, a sum, each of which waits for the one before; then V
# goes in. A chain of dependent work, one head after the other. Nothing forbids that head 1 begins
# while head 0 is in its softmax, and the compiler may move vector instructions as it likes. But
# products enter the queue of the MXU in the order of the *program*:
#
# - as written: `QK0 PV0 QK1 PV1 QK2 PV2 ...`: PV0 waits for its softmax, and QK1 behind it;
# - one ahead: `QK0 QK1 PV0 QK2 PV1 QK3 ...`: while softmax 0 is computed, QK1 is in the MXU.
#
# Nothing but the order is changed:

# %%
for step in ("odd stride", "Q K one head ahead", "two heads ahead"):
    cost = {chip: recorded_step(chip, step).bundles for chip in CHIPS}
    print(f"{step:20}", ", ".join(f"{chip} {bundles:5,}" for chip, bundles in cost.items()))
    assert recorded_step("v5e", step).slots["MATMUL"] == written.slots["MATMUL"]

# %% [markdown]
# In exercise 9.3 you write it, and the compiler of a v5e is your judge. Rung 8 does it with
# a generator that makes the softmaxes, and a loop that gets each of them a few later:

# %%
from rpa.kernel.mixed import Tiled

show_source(mxu.delayed)
show_source(Tiled._attend_groups)

# %% [markdown]
# **Takeaway.** The MXU takes products in the order in which you write them. Write Q K^T of the next
# head before P V of this one.

# %% [markdown]
# ## 6. What are four rows good for?
#
# A decode has 4 query heads per KV head, so 4 rows in registers of 8 (of 16, in bfloat16), and
# eight chains of them. Put four heads in one product: queries on the diagonal, zeros elsewhere.

# %%
pictures.block_diagonal(4)

# %% [markdown]
# By hand, two heads of one row and two lanes: q0 = (1, 0), q1 = (0, 2); a token has the keys (3, 4)
# and (5, 6):

# %%
wide_q = inner_loop.block_diagonal([jnp.array([[1, 0]]), jnp.array([[0, 2]])])
wide_k = jnp.array([[3, 4, 5, 6]])  # both heads of one token, side by side
print(wide_q.tolist(), "times", wide_k.tolist(), "gives", (wide_q @ wide_k.T).ravel().tolist())
assert (wide_q @ wide_k.T).ravel().tolist() == [1 * 3 + 0 * 4, 0 * 5 + 2 * 6]

# %% [markdown]
# Three quarters of the products are with zeros. It does not matter: the MXU is busy *taking in* K
# and V, and 16 rows go through as fast as 4. What is won: two chains with full registers in place
# of eight with half-empty ones.

# %%
for step in ("two heads ahead", "four heads a product"):
    cost = {chip: recorded_step(chip, step).bundles for chip in CHIPS}
    print(f"{step:20}", ", ".join(f"{chip} {bundles:5,}" for chip, bundles in cost.items()))
assert recorded_step("tpu7x", "four heads a product").bundles < hbm_cycles("tpu7x")

# %% [markdown]
# With that a TPU7x is below its HBM time for the first time. Not more heads: with all eight in one
# product there is a single chain, and nothing overlaps it. When it was tried in rung 8, eight heads
# and two heads per product both took about an eighth more bundles than four (`docs/ablations.md`).
#
# **Takeaway.** Where the MXU is bound by its weights, rows are free. Fill them with other heads.

# %% [markdown]
# ## 7. What if one sequence is not enough?
#
# Two chains are few; at the start and the end of a block most units idle. A decode batch has other
# sequences. Rung 8 computes **two at a time**, and the chains of one fill the gaps of the other.
# Before and after, on the same scale; below, *two* sequences are computed:

# %%
pictures.before_after(
    {
        "One head after the other, one sequence": recorded_step("v5e", "odd stride"),
        "Six steps, two sequences": recorded_step("v5e", "two sequences together"),
    }
)

# %% [markdown]
# MATPUSH is full from the first bundle to the last: the second floor of section 2.
#
# The price: of two sequences of unequal length, the shorter one waits for the longer. What is
# computed together never changes a result: every chain starts from nothing, and is merged with what
# its own sequence has summed up before. That is the room `decode` of rung 8:

# %%
from rpa.kernel.decode import Decode

show_source(Decode._attend_sub_block)

# %% [markdown]
# **Takeaway.** Latency is cured by more independent work: other heads, other sequences. When a unit
# is full, you are done with order.

# %% [markdown]
# ## 8. Which side goes in?
#
# K and V are the weights, so MATPUSH is the fullest unit; four rows of queries per head go through,
# so MATMUL idles. But which side of a product is the weights is a matter of writing. By hand, one
# query (2, 1) and three keys (1, 0), (0, 1), (3, 3):

# %%
q, k = jnp.array([[2, 1]]), jnp.array([[1, 0], [0, 1], [3, 3]])
print("Q K^T:", (q @ k.T).tolist(), " 3 keys go in, 1 row goes through")
print("K Q^T:", (k @ q.T).T.tolist(), " 1 query goes in, 3 rows go through")
assert (q @ k.T == (k @ q.T).T).all()

# %% [markdown]
# Turn all keys round, and MATMUL has the work instead. Turn *some*, and the two share it, for a
# bundle has slots for both. The scores come out as [keys, queries], and the XLU turns them back (on
# v6e and TPU7x it had a part of K to transpose; of that it has less now). How many? Two sequences,
# by quarters of the keys:

# %%
print("turned", *(f"{quarters}/4".rjust(7) for quarters in range(4)))
for chip in CHIPS:
    print(f"{chip:6}", *(f"{bundles:7,}" for bundles in recorded("turned")[chip]))
best = {chip: int(np.argmin(recorded("turned")[chip])) for chip in CHIPS}
assert best == {"v5e": 1, "v6e": 2, "tpu7x": 2}

# %% [markdown]
# In a cycle every chip takes in one key of all eight heads. A v5e, whose MXUs are 128 wide, lets
# half a key through, the others (256 wide) a whole one: there more keys should. Here is the loop as
# it was and with a quarter turned, on a v5e:

# %%
pictures.before_after(
    {
        "All keys go in": recorded_step("v5e", "two sequences together"),
        "A quarter goes through": recorded_step("v5e", "a quarter of the keys swapped"),
    }
)

# %% [markdown]
# MATPUSH still binds, but it has less to take in, and MATMUL works in the same bundles. In rung 8
# it is a room of its own:

# %%
show_source(mxu)

# %% [markdown]
# A product of rung 8 has 512 keys by default, which is one cell. Float32, and dots of fewer than
# 384 lanes, turn none (`Tricks.swaps_operands`).
#
# All seven steps, per sequence, next to HBM. The last one turns a quarter on every chip; v6e and
# TPU7x do better with half, see the table.


# %%
def per_sequence(chip, step):
    return recorded_step(chip, step).bundles / inner_loop.STEPS[step].num_seqs


bundles = {chip: {step: per_sequence(chip, step) for step in inner_loop.STEPS} for chip in CHIPS}
pictures.steps_against_hbm(bundles, {chip: hbm_cycles(chip) for chip in CHIPS})

# %%
for chip in CHIPS:
    values = list(bundles[chip].values())
    less = values[0] / values[-1]
    print(f"{chip:6} {values[0]:6,.0f} bundles to {values[-1]:4,.0f}, {less:4.1f} times fewer; "
          f"HBM {hbm_cycles(chip):5,.0f} cycles")  # fmt: skip
    assert values == sorted(values, reverse=True) and values[-1] < hbm_cycles(chip)
assert list(bundles["v5e"].values())[-1] == 763

# %% [markdown]
# **Takeaway.** When a unit is full, look for one that is not, and write the work so that it can
# take a part.

# %% [markdown]
# ## 9. What does a prefill wait for?
#
# Prefill has rows enough: 512 for each KV head. Here is rung 4, whose occupancy you saw in chapter
# 4, and the mixed kernel of rung 8, on one scale: 512 rows x 512 keys, of **one** head above, of
# **eight** below.

# %%
rung4 = Occupancy(**recorded("tiled"))
rung8 = Occupancy(**recorded("kernels")["v5e"]["mixed"]["units"])
pictures.before_after({"Rung 4, one KV head": rung4, "Rung 8, eight KV heads": rung8})

# %%
per_head = rung8.bundles / 8
print(f"per head: rung 4 {rung4.bundles:,} bundles, rung 8 {per_head:,.0f}; MATMUL floor 1,024")
assert per_head < 0.6 * rung4.bundles and rung8.bound == "MATMUL"

# %% [markdown]
# Three things made the difference. Order, as in section 5: two heads ahead, and of the last head
# one half after the other, since no other head has products left to run during its softmax. **Masks
# off the common path**: rung 4 compares positions in every block, rung 8 only where the diagonal or
# an end goes through (chapter 8), and what it does there costs:

# %%
for chip in CHIPS:
    mixed = recorded("kernels")[chip]["mixed"]
    inner, masked = mixed["interior_region"], mixed["masked_region"]
    print(f"{chip:6} without a mask {inner:5,.0f} bundles, with one {masked:5,.0f} "
          f"({masked / inner - 1:+.0%}); of the floor {mixed['floor'] / inner:.0%}")  # fmt: skip
    assert mixed["floor"] < inner < masked

# %% [markdown]
# It once was 18 % on v6e, because masks were compared again for every head: 2.6
# instructions per register of scores. Now they are computed once, stored as *limits*, and a score
# becomes `min(score, limit)`: a load and one instruction.
#
# And third, on v6e and TPU7x, **the idle half**. Their MXU is 256 wide, a head is 128: half of it
# multiplies nothing, while the vector unit is the one that is full. So the idle half does the
# vector unit's work:

# %%
show_source(mxu.append_ones)

# %% [markdown]
# Columns of ones next to V: P [V, 1] = [P V, sum P]. The sum of the weights comes with the product,
# for nothing. By hand: weights (2, 3), values (10, 20) become (10, 1), (20, 1): 80 and 5.

# %%
p, v = jnp.array([[2.0, 3.0]]), jnp.array([[10.0], [20.0]])
with_ones = p @ mxu.append_ones(v)
print("P V:", float(with_ones[0, 0]), " sum P:", float(with_ones[0, 1]))
assert with_ones[0, :2].tolist() == [80.0, 5.0]

# %% [markdown]
# What each idea brought on v6e on the day it came, one on top of the other, bundles without and
# with a mask (history, from `docs/ablations.md`; what the kernel has today is printed above): 5,116
# and 6,052 before; row sums by ones 4,629 and 5,651; masks as limits 4,629 and 5,398; two heads
# ahead 4,612 and 5,354; the scale folded into the queries 4,642 and 4,945. The halves brought v6e
# nothing, and a TPU7x from 5,005 to 4,861.
#
# What did *not* help is worth as much: three heads ahead spills, and was 5 % slower on a TPU7x; the
# same sums without any head ahead make the MXU wait, a quarter longer on v6e; a third copy of the
# code for full masked blocks saves 5 % of those, and makes every compilation longer.
#
# **Takeaway.** Prefill is bound by MATMUL if you keep the vector unit out of its way: masks where
# they matter, sums and scales where a unit idles.


# %% [markdown]
# ## 10. From rung 7 to rung 8, one step at a time
#
# The bench showed each step on top of the last. Is that what a step is worth in the kernel? Turn
# the question round: take rung 8 as it is, take *one* optimisation away, compile and execute it,
# and compare. Each is one line of `rpa/kernel/` (`tools/record_steps.py` changes it in a copy of
# the package). `python -m rpa lab steps` prints the table, with the reason for each row:

# %%
from rpa.lab.schedule import steps

print(steps.table(steps.rows()))
worth = {(row.step, row.where): row.values for row in steps.rows()}

# %% [markdown]
# Rows "inner loop" are a decode of 512 tokens on the bench, before and after. Rows "kernel" are all
# of rung 8 without the step and with it: bundles of a decode of 1,024 tokens, bundles of a mixed
# tile, and, in the last row, microseconds of 256 short decodes.
#
# Three readings. **Order is worth most**, and it costs not one instruction: without it a TPU7x
# takes more than twice as long. **No step is worth on one chip what it is worth on another**: half
# of an MXU that idles is not there on a v5e, and copies that start early help only where HBM is
# fast. And **the sum of the parts is not the whole**: in the kernel the odd stride is worth 11 to
# 14 %, three times as much as on the bench, because by now the loads are what is waited for.

# %%
order = worth["order of products", "kernel, decode"]["tpu7x"]
odd = {where: worth["odd stride", where]["v6e"] for where in ("inner loop", "kernel, decode")}
ahead = worth["copies further ahead", "kernel, batch"]
assert order[0] > 2 * order[1]
assert odd["kernel, decode"][0] / odd["kernel, decode"][1] > 1.1
assert odd["inner loop"][0] / odd["inner loop"][1] < 1.06
assert ahead["tpu7x"][0] > 1.3 * ahead["tpu7x"][1] and ahead["v5e"][0] < 1.01 * ahead["v5e"][1]

# %% [markdown]
# One step is not in the table, because it has no time to show: rung 7 keeps the page table in SMEM,
# which holds 262,144 page numbers; rung 8 streams it from HBM, so that no context is too long.
#
# **Takeaway.** Nine changes make rung 8 out of rung 7. Each is a line that can be taken away, and
# the lab says what that costs.

# %% [markdown]
# ## 11. What does the chip execute?
#
# A schedule tells when, not what. The lab executes that, too: `rpa.lab.chip` takes the last text
# that the compiler writes before it packs instructions into bundles, and does what each of them
# says, in NumPy. So a kernel runs **as compiled** on a laptop, with the chip's registers, addresses
# and packing. Here is a whole kernel for a v5e, `out[...] = x[pl.ds(1, 10, stride=3)]`, every third
# row of f32[40, 128]:

# %%
from rpa.lab.chip import KernelFault, step_listing, strided_load

listing = strided_load()
print(*listing, sep="\n")

# %% [markdown]
# `%x` and `%out` are addresses. A register is 8 sublanes of 128 lanes: `vector<8x128xf32>`. Ten
# rows are one register and two sublanes of another, so there are two loads; `masked %0` with `%0` =
# 3, binary 11, lets two sublanes through. The stride is in the instruction: sublane s gets the row
# `stride * s` after the address. Step through it, on rows that hold their own number; of a register
# you see lane 0 of its sublanes:

# %%
rows = np.arange(40.0).repeat(128).reshape(40, 128)  # row r holds r in every lane
out, steps = step_listing(listing, rows, num_out=10)
print(*steps, sep="\n")
assert out[:, 0].tolist() == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28]

# %% [markdown]
# By hand: the array begins at byte 16,384, a row is 512 bytes, so row 1 is at 16,896. Sublane 0 has
# row 1, sublane 1 row 1 + 3. What no load has written is NaN: had the store not been masked, it
# would show.
#
# Rung 8 loads the keys of one head in this way: tokens are rows, and the stride is the number of
# rows per token. What if the compiler, or the kernel, had a wrong one?

# %%
wrong, _ = step_listing(
    [line.replace("sublane_stride = 3", "sublane_stride = 2") for line in listing], rows, num_out=10
)
print("stride 2:", wrong[:, 0].tolist())
assert wrong[:, 0].tolist() == [1, 3, 5, 7, 9, 11, 13, 15, 25, 27]

# %% [markdown]
# No error, no NaN: rows of another token, a wrong answer. The interpreter cannot show it, for rung
# 8 gives it another code path, without strides. So this machine is what tests rung 8: all layout
# paths on three chips, and hundreds of generated batches, are right as compiled (`docs/chip.md`
# says what that proves, and what only a TPU can tell).
#
# A load further on than the array is long is an error, in words:

# %%
far = [line.replace("sublane_stride = 3", "sublane_stride = 12") for line in listing]
try:
    step_listing(far, rows, num_out=10)
except KernelFault as fault:
    print(fault)
    assert "leave" in str(fault)

# %% [markdown]
# Your own kernel, on a machine with libtpu: `rpa.lab.chip.run(function, *arrays, chip="v6e")`
# returns what it returns there, and `rpa.lab.chip.step_through(function, *arrays)` all its steps.
# Two exercises are about reading them: 9.5 and 9.6.
#
# **Takeaway.** An address, a stride, a mask: that is all a load knows. A wrong stride is no crash,
# it is the row of another token.

# %% [markdown]
# ## What is still slow
#
# The last bundles of each loop. At its start and its end the MXU has nothing that is independent
# yet, or no more:

# %%
for chip in CHIPS:
    mixed = recorded("kernels")[chip]["mixed"]
    print(f"{chip:6} mixed tile: {mixed['floor'] / mixed['interior_region']:.0%} of the floor; "
          f"decode: {recorded('kernels')[chip]['decode']['bound']} binds")  # fmt: skip
    assert mixed["floor"] > 0.8 * mixed["interior_region"]

# %% [markdown]
# **Chapter 10** goes from the inner loop to the batch: how large the blocks should be, how far the
# copies must run ahead, and what time comes of it all.
#
# **Before you go on:** do [the exercises of this chapter](../exercises/09_inner_loop.ipynb).
#
# **Read more:**
#
# - [Matrix multiplication in Pallas](https://docs.jax.dev/en/latest/pallas/tpu/matmul.html): the
#   same kind of ladder, measured on a TPU.
# - [FlashAttention-3](https://arxiv.org/abs/2407.08608), Shah et al. 2024: softmax next to
#   products, on a GPU.
