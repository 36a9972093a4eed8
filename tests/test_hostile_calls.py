"""The public function under users: what they pass, transform, interrupt and share.

Each row of `REFUSED` is a kind of wrong argument, refused in words by every backend before anything
is computed; the cache stays as it was and is still there.
"""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rpa
from rpa import interpreter
from rpa.page_pool import NO_PAGE, PagePool
from rpa.ragged import RaggedBatch
from tests.batches import Shape, bits, make_case

SHAPE = Shape(num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=8, max_num_seqs=4)
LENGTHS = [(1, 9), (4, 4), (3, 20)]  # one decode, two mixed
BACKENDS = ("interpret", "reference")

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def case():
    return make_case(SHAPE, LENGTHS)


def call(case, *, changed=None, **options):
    named = dict(zip(("queries", "keys", "values", "kv_cache"), case.arrays, strict=True))
    b = case.batch
    named |= {"kv_lens": b.kv_lens, "page_indices": b.page_indices, "cu_q_lens": b.cu_q_lens}
    named |= {"distribution": b.distribution} | (changed or {})
    return rpa.ragged_paged_attention(*named.values(), **{"sm_scale": 0.125} | options)


# --- Arguments --------------------------------------------------------------------------------

FLAGS = ("use_causal_mask", "update_kv_cache", "skip_kv_mask", "debug_mode", "donate")
FLAGS += ("disable_bounds_checks", "disable_semaphore_checks", "validate")
SCALES = ("sm_scale", "q_scale", "k_scale", "v_scale", "soft_cap")
NOT_NUMBERS = {
    "NumPy NaN": np.array(np.nan),
    "JAX NaN": jnp.array(jnp.nan),
    "JAX infinity": jnp.array(jnp.inf),
    "more than float32": 1e300,
    "more than any float": 10**400,
    "complex": 1j,
    "complex array": np.array(1j),
    "text": "1",
    "text array": np.array("1"),
    "a row": np.ones(2),
}
NOT_POSITIVE = {"zero": 0, "NumPy zero": np.array(0.0), "JAX minus one": jnp.array(-1.0)}

REFUSED = (
    {f"{name}: {value!r}": ({name: value}, f"{name} is .* must be True or False")
     for name in FLAGS for value in ("yes", 2, np.array([1, 2]))}
    | {f"{name}: {kind}": ({name: value}, f"{name} .*must be (one number|finite|positive)")
       for name in SCALES for kind, value in NOT_NUMBERS.items()}
    | {f"{name}: {kind}": ({name: value}, f"{name} must be positive")
       for name in SCALES[1:] for kind, value in NOT_POSITIVE.items()}
    | {f"window {value!r}": ({"sliding_window": value}, "sliding_window must be positive")
       for value in (-1, 1.0, np.nan, np.inf, "1", np.array([1]), jnp.array(0))}
    | {f"output {dtype}": ({"out_dtype": dtype}, "out_dtype is .*at most 32 bits")
       for dtype in ("float64", np.float64, "complex64", "int32", "x", 3)}
    | {f"sinks of {dtype}": ({"attention_sink": np.ones(4, dtype)}, "attention_sink has dtype")
       for dtype in (int, bool, complex)}
)  # fmt: skip

CHANGED = {
    "a page too far": ("page_indices", lambda a: np.full_like(a, 19), "is 19, but kv_cache has 19"),
    "no page": ("page_indices", lambda a: np.full_like(a, -1), "is -1, but kv_cache has 19 pages"),
    "ones": ("cu_q_lens", np.ones_like, r"cu_q_lens\[0\] is 1, but must be 0"),
    "too long": ("cu_q_lens", lambda a: np.append(a, a[-1]), r"cu_q_lens has shape \(6,\).*\(5,\)"),
    "too short": ("cu_q_lens", lambda a: a[:-1], r"cu_q_lens has shape \(4,\).*\(5,\)"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", REFUSED)
def test_wrong_options_are_refused_in_words(case, kind, backend):
    options, words = REFUSED[kind]
    with pytest.raises(ValueError, match=words):
        call(case, **{"backend": backend} | options)


@pytest.mark.parametrize("backend", ["x", "", 3, np.arange(3), ["tpu"], True], ids=repr)
def test_what_is_no_backend_is_refused(case, backend):
    with pytest.raises(ValueError, match="backend is .*must be one of 'tpu'"):
        call(case, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CHANGED)
def test_wrong_lengths_and_pages_are_refused_in_words(case, kind, backend):
    name, change, words = CHANGED[kind]
    before = jnp.array(case.kv_cache)
    with pytest.raises(ValueError, match=words):
        call(
            case,
            changed={name: change(np.asarray(getattr(case.batch, name))), "kv_cache": before},
            backend=backend,
        )
    np.testing.assert_array_equal(bits(before), bits(case.kv_cache))


@pytest.mark.parametrize("name", FLAGS)
def test_a_traced_flag_is_named(case, name):
    def traced(flag):
        return call(case, **{name: flag})

    with pytest.raises(ValueError, match=f"{name} is a traced value.*static_argnames"):
        jax.jit(traced)(True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["queries", "keys", "values", "kv_cache", "kv_lens"])
def test_what_was_donated_is_named(case, name, backend):
    array = jnp.array(getattr(case.batch if name == "kv_lens" else case, name))
    array.delete()
    words = "updated it in place.*donate=False" if name == "kv_cache" else "was donated to a jitted"
    with pytest.raises(ValueError, match=f"{name} has been deleted: .*{words}"):
        call(case, changed={name: array}, backend=backend)


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), -1, 0, "all", np.array([1, 2])])
def test_a_limit_that_is_no_number_of_bytes_is_refused(case, limit):
    with pytest.raises(ValueError, match="vmem_limit_bytes is .*positive, a number of bytes"):
        call(case, vmem_limit_bytes=limit)


# --- Tables that are too short ----------------------------------------------------------------


def test_every_table_that_is_made_here_is_padded_with_what_is_no_page():
    batch, _ = RaggedBatch.from_lengths([1, 2], [9, 17], [[3], [0, 1, 2]], max_num_seqs=3)
    table = np.asarray(batch.page_indices).reshape(3, -1)
    assert table.tolist() == [[3, NO_PAGE, NO_PAGE], [0, 1, 2], [NO_PAGE] * 3]
    pool = PagePool(4, 8)
    pool.allocate("a", 9)
    assert pool.page_table(["a"], 4).tolist() == [[0, 1, NO_PAGE, NO_PAGE]]
    # The row of sequence 0 is one page short: page 0, which is another's, is not written.
    with pytest.raises(ValueError, match="sequence 0, page 1 is -1"):
        batch.validate(num_tokens=3, num_pages=4, page_size=8)


def test_what_pads_a_table_is_no_page_of_any_layer():
    from rpa.models import llama

    sizes = dict(num_layers=3, hidden_size=8, num_q_heads=1, num_kv_heads=1, head_dim=8)
    config = llama.LlamaConfig(**sizes, ffn_size=8, vocab_size=4, context_len=8)
    shapes = llama.param_shapes(config)
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    seen = []

    def attention(queries, keys, values, kv_cache, batch, *, sm_scale):
        jax.debug.callback(lambda pages: seen.append(pages.tolist()), batch.page_indices)
        return queries, kv_cache

    batch, _ = RaggedBatch.from_lengths([1], [1], [[1]], pages_per_seq=2)
    tokens = jnp.zeros(1, jnp.int32)
    cache = jnp.zeros((6, 8, 2, 1, 128))
    llama.forward(params, config, tokens, tokens, cache, batch, attention)
    jax.effects_barrier()
    assert sorted(seen) == [[1, NO_PAGE], [3, NO_PAGE], [5, NO_PAGE]]


# --- Values at the edge of what numbers can be ------------------------------------------------


def run(case, **options):
    output, _ = call(case, donate=False, **options)
    return np.asarray(output)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_past_every_position_hides_nothing(case, backend):
    all_of_it = run(case, backend=backend)
    for window in (2**31 - 1, 2**31, np.int64(2**40), np.uint32(2**31), 2**63, 10**30):
        np.testing.assert_array_equal(run(case, backend=backend, sliding_window=window), all_of_it)


def test_a_chunk_past_every_length_is_any_length(case):
    np.testing.assert_array_equal(run(case, chunk_prefill_size=2**40), run(case))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_of_nan_stays_visible_and_in_its_head(case, backend):
    sinks = np.zeros(4, np.float32)
    sinks[2] = np.nan
    output, rows = run(case, backend=backend, attention_sink=sinks), slice(len(case.new_slots))
    assert np.isnan(output[rows, 2]).all()
    assert np.isfinite(output[rows, [0, 1, 3]]).all()


def rarely(*values):
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


@pytest.mark.parametrize("head_dim", [64, 80, 128, *rarely(16, 96, 112, 192, 240, 256)])
def test_padding_of_cached_keys_must_be_finite(head_dim):
    """The one thing about another program's cache that a kernel takes on trust."""
    shape = Shape(num_q_heads=2, num_kv_heads=1, head_dim=head_dim, page_size=8, max_num_seqs=2)
    case = make_case(shape, [(1, 9), (2, 12)])
    call(case, backend="reference", validate=True)
    expected = run(case, backend="reference")
    cache = np.array(case.kv_cache)
    cache[:, :, 1:, :, head_dim:] = np.nan  # values, and the heads that pad
    cache[:, :, 0, :, head_dim:][np.isnan(cache[:, :, 0, :, :1]).all(axis=-1)] = np.nan
    of_values = {"changed": {"kv_cache": cache.copy()}, "donate": False, "validate": True}
    np.testing.assert_array_equal(np.asarray(call(case, **of_values)[0]).shape, expected.shape)
    np.testing.assert_allclose(np.asarray(call(case, **of_values)[0]), expected, atol=1e-5)
    if head_dim % 128 == 0:
        return
    cache[..., head_dim:] = np.nan
    of_keys = {"changed": {"kv_cache": cache}, "donate": False}
    with pytest.raises(ValueError, match=f"not finite in lanes {head_dim} to .*pad head_dim"):
        call(case, **of_keys, validate=True)
    with pytest.raises(ValueError, match="not finite in lanes"):
        call(case, **of_keys, validate=True, backend="reference")
    unharmed, _ = call(case, **of_keys, backend="reference")
    np.testing.assert_array_equal(np.asarray(unharmed), expected)


# --- Transformations --------------------------------------------------------------------------

OPERANDS = ("queries", "keys", "values", "kv_cache")


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", OPERANDS)
def test_a_gradient_is_refused_in_words(case, name, jitted):
    def loss(array):
        return call(case, changed={name: array}, donate=False)[0].sum()

    with pytest.raises(NotImplementedError, match="ragged_paged_attention has no gradient"):
        jax.grad(jax.jit(loss) if jitted else loss)(jnp.asarray(getattr(case, name)))


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", [*OPERANDS, "kv_lens"])
def test_vmap_is_refused_in_words(case, name, jitted):
    def mapped(array):
        return call(case, changed={name: array}, donate=False)[0]

    array = jnp.asarray(getattr(case.batch if name == "kv_lens" else case, name))
    with pytest.raises(NotImplementedError, match="cannot be mapped with jax.vmap"):
        jax.vmap(jax.jit(mapped) if jitted else mapped)(jnp.stack([array, array]))


def test_the_reference_takes_vmap_and_forward_derivatives(case):
    def attend(queries):
        return call(case, changed={"queries": queries}, backend="reference")[0]

    queries = jnp.asarray(case.queries)
    mapped = jax.vmap(attend)(jnp.stack([queries, 2 * queries]))
    np.testing.assert_allclose(mapped[1], attend(2 * queries), atol=1e-6)
    _, slope = jax.jvp(attend, (queries,), (queries,))
    step = 1e-2
    difference = (attend((1 + step) * queries) - attend((1 - step) * queries)) / (2 * step)
    np.testing.assert_allclose(slope, difference, atol=1e-3)


# --- One interpreter for all ------------------------------------------------------------------


def test_a_call_that_fails_in_the_interpreter_fails_alone(case):
    expected = run(case)
    page_too_far = {"page_indices": np.full_like(np.asarray(case.batch.page_indices), 99)}
    for _ in range(2):
        with pytest.raises(Exception, match="Out-of-bounds|out of bounds"):
            call(case, changed=page_too_far, validate=False, donate=False)
        np.testing.assert_array_equal(run(case), expected)


def test_a_kernel_of_somebody_else_that_failed_is_forgotten(case):
    """Nothing waits for it, so its error waits in the order of callbacks."""
    expected = run(case)

    @jax.jit
    def fails(x):
        def raises(_):
            raise RuntimeError("an old error")

        shape = jax.ShapeDtypeStruct((), x.dtype)
        return jax.experimental.io_callback(raises, shape, x, ordered=True)

    for forget in (lambda: run(case), lambda: interpreter.choose_interpret(None)):
        with contextlib.suppress(Exception):  # some versions raise here already
            fails(jnp.float32(1))
        forget()
        np.testing.assert_array_equal(run(case), expected)
        jax.effects_barrier()


def test_threads_take_turns(case):
    expected, got = run(case), {}

    def attend(n):
        got[n] = run(case)

    threads = [threading.Thread(target=attend, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(6))
    for output in got.values():
        np.testing.assert_array_equal(output, expected)
