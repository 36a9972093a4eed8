"""The lab's commands on a function of any signature (`--arg`), and on options of a kernel."""

import json
import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpa import compat, lab
from rpa.__main__ import main
from rpa.chips import attention_cost
from rpa.lab.arguments import DTYPES, Argument, parse_argument, parse_option
from rpa.lab.batches import make_batch
from rpa.lab.copies.call_traffic import count_call
from rpa.lab.copies.traffic import least
from rpa.lab.predict import predict_batch
from rpa.lab.schedule.call import execute_call
from rpa.shapes import AttentionShape
from tests import schedule_programs

needs_libtpu = pytest.mark.skipif(
    lab.compile_versions()["libtpu"] is None or compat.JAX_VERSION < (0, 8),
    reason="schedules need libtpu, and jax 0.8 or newer",
)

SUM_TILES = "tests.schedule_programs:sum_tiles"
ARRAYS = ["--arg", "i32[4]=4,7,0,10", "--arg", "i32[4,8]=iota", "--arg", "f32[40,8,128]"]
NUM_TILES = 4 // 2 + 7 // 2 + 10 // 2
TILE_BYTES = 8 * 128 * 4

# --- What is written --------------------------------------------------------------------------

numbers = st.integers(-(2**31), 2**31 - 1)


@given(st.lists(st.integers(1, 3), max_size=3), st.data())
def test_what_is_written_is_what_is_read(shape, data):
    size = int(np.prod(shape, dtype=int))
    values = data.draw(st.lists(numbers, min_size=size, max_size=size))
    text = f"i32[{','.join(map(str, shape))}]={','.join(map(str, values))}"
    array = parse_argument(text).array()
    assert array.dtype == np.int32 and array.ravel().tolist() == values
    assert array.shape == tuple(shape)


@pytest.mark.parametrize(("short", "long"), DTYPES.items())
def test_both_names_of_a_dtype_are_the_same(short, long):
    both = [parse_argument(f"{name}[2,3]=ones") for name in (short, long)]
    assert both[0] == both[1] and str(both[0]) == f"{short}[2,3]"
    assert both[0].array().dtype.name == long and (both[0].array() == 1).all()


def test_fills():
    assert parse_argument("i32[2,2]=iota").array().tolist() == [[0, 1], [2, 3]]
    assert parse_argument("f32[3]=0.5").array().tolist() == [0.5] * 3
    assert parse_argument("f32[]=2").array().shape == ()
    one, other = (parse_argument("f32[64]").array() for _ in range(2))
    assert (one == other).all() and one.std() > 0.5, "random, and the same each time"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not an array: expected DTYPE"),
        ("f32", "is not an array: expected DTYPE"),
        ("f32[2", "is not an array: expected DTYPE"),
        ("f99[2]", "has dtype 'f99'; expected one of f32"),
        ("f32[,]", "has sizes [,]; expected whole numbers"),
        ("f32[99999999999]", "has sizes [99999999999]"),
        ("i32[2]=", "has values ''; expected int32 numbers"),
        ("i32[2]=1.5", "has values '1.5'; expected int32 numbers"),
        ("i8[1]=300", "has values '300'; expected int8 numbers"),
        ("f32[2]=x,y", "has values 'x,y'; expected float32 numbers"),
        ("i32[3]=1,2", "has 2 values, but the shape has 3 elements"),
        ("i32[3]=random", "there are no random integers"),
    ],
)
def test_a_wrong_array_is_refused_in_words(text, words, capsys):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_argument(text)
    with pytest.raises(SystemExit) as ended:
        main(["lab", "traffic", "--kernel", SUM_TILES, f"--arg={text}"])
    assert ended.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "x", "=1", "x=", "1x=2", "a b=1"])
def test_a_wrong_option_is_refused_in_words(text):
    with pytest.raises(ValueError, match="is not an option: expected NAME=VALUE"):
        parse_option(text)


def test_integers_without_values_are_refused_where_they_decide():
    with pytest.raises(ValueError, match=re.escape("i32[4] has no values")):
        Argument("int32", (4,)).known()


# --- Any signature ----------------------------------------------------------------------------


def test_traffic_follows_the_integers(capsys):
    assert main(["lab", "traffic", "--kernel", SUM_TILES, *ARRAYS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["arrays"]["tiles"] == {
        "array_bytes": 40 * TILE_BYTES,
        "read_bytes": NUM_TILES * TILE_BYTES,
        "written_bytes": 0,
        "copies": NUM_TILES,
    }
    assert found["num_bytes"] == sum(
        a["read_bytes"] + a["written_bytes"] for a in found["arrays"].values()
    )
    assert main(["lab", "traffic", "--kernel", SUM_TILES, *ARRAYS, "--chip", "v5e"]) == 0
    assert "at the peak bandwidth of v5e" in capsys.readouterr().out


def copy_rows(x):
    def kernel(x_ref, out_ref, sem):
        copy = pltpu.make_async_copy(x_ref.at[pl.ds(0, 8)], out_ref.at[pl.ds(8, 8)], sem)
        copy.start()
        copy.wait()

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[in_hbm],
        out_specs=in_hbm,
        scratch_shapes=[pltpu.SemaphoreType.DMA],
    )(x)


def test_a_copy_inside_hbm_is_one_copy_that_is_read_and_written():
    traffic = count_call(copy_rows, np.zeros((16, 128), np.float32))
    assert traffic.num_copies == 1 and traffic.num_bytes == 2 * 8 * 128 * 4


@pytest.mark.skipif(
    compat.JAX_VERSION < (0, 8),
    reason="the recorder does not know how jax 0.7.2 allocates whole arguments in SMEM",
)
def test_timeline_runs_the_function(capsys):
    assert main(["lab", "timeline", "--kernel", SUM_TILES, *ARRAYS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(" start " in line for line in lines) == NUM_TILES


@needs_libtpu
def test_compile_needs_no_values(capsys):
    arrays = [text.split("=")[0] for text in ARRAYS]
    assert main(["lab", "compile", "--chip", "v5e", "--kernel", SUM_TILES, *arrays]) == 0
    assert capsys.readouterr().out.startswith("v5e    compiled in ")


@needs_libtpu
def test_schedule_and_predict_execute_the_call(capsys):
    command = ["--chip", "v5e", "--kernel", SUM_TILES, *ARRAYS, "--json"]
    assert main(["lab", "schedule", *command]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pallas_call"] == "sum_tiles"
    arrays = [parse_argument(text).known() for text in ARRAYS[1::2]]
    schedule, run = execute_call("v5e", schedule_programs.sum_tiles, *arrays)
    assert found["bundles"] == run.bundles == schedule.execute(*arrays).bundles
    assert run.bytes_moved("hbm_to_vmem") == NUM_TILES * TILE_BYTES
    assert main(["lab", "predict", *command]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert predicted["bundles"] == run.bundles and predicted["mbu"] is predicted["mfu"] is None
    assert predicted["time_us"] > run.bundles / 1.5e9 * 1e6  # it waits for its copies


@needs_libtpu
def test_a_call_is_saved_and_compared(tmp_path, capsys):
    command = ["lab", "schedule", "--chip", "v5e", "--kernel", SUM_TILES, *ARRAYS]
    file = str(tmp_path / "before.json")
    assert main([*command, "--save", file]) == 0
    capsys.readouterr()
    assert main([*command, "--against", file]) == 0
    assert f"worst 1.000: v5e {SUM_TILES}, executed" in capsys.readouterr().out
    assert main([*command, "--against", SUM_TILES]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" 1.000")


@needs_libtpu
def test_one_of_several_kernels_is_found_by_its_name(capsys):
    command = ["lab", "schedule", "--chip", "v5e", "--kernel", "tests.schedule_programs:unnamed"]
    command += ["--arg", "f32[8,128]", "--option", "times=2"]
    assert main(command) == 2
    assert "must find exactly one of the kernels of this function" in capsys.readouterr().err


@needs_libtpu
def test_a_kernel_that_asks_for_the_interpreter_is_not_compiled(tmp_path, capsys):
    file = tmp_path / "interpreted.py"
    file.write_text(INTERPRETED)
    command = ["--chip", "v5e", "--kernel", f"{file}:double", "--arg", "f32[8,128]"]
    assert main(["lab", "schedule", *command]) == 2
    assert "asks for the interpreter (interpret=...)" in capsys.readouterr().err
    assert main(["lab", "compile", *command]) == 0
    assert "no Pallas kernel in it" in capsys.readouterr().out


INTERPRETED = """
import jax
from jax.experimental import pallas as pl
from rpa import interpreter


def _kernel(x_ref, out_ref):
    out_ref[...] = 2 * x_ref[...]


def double(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(_kernel, out_shape=shape, interpret=interpreter.params())(x)
"""


def test_what_a_function_raises_is_a_sentence_with_its_line(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("def f(x):\n    return {}['page']\n")
    for command in ("traffic", "timeline"):
        assert main(["lab", command, "--kernel", f"{file}:f", "--arg", "f32[8]"]) == 2
        assert f"f raised KeyError: 'page' (at {file}:2, in f)" in capsys.readouterr().err
    file.write_text("def f(x:\n")
    assert main(["lab", "traffic", "--kernel", f"{file}:f", "--arg", "f32[8]"]) == 2
    assert "raised SyntaxError: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["compile", "--kernel", "kernel", *ARRAYS], "--kernel is kernel: name a function"),
        (["schedule", "--chip", "v5e", *ARRAYS], "--kernel is rpa: name a function"),
        (["schedule", "--chip", "v5e"], "--case is missing: expected one of decode, mixed, all"),
        (["traffic", "--kernel", "tiled", "--batch", "1x8/8", "--option", "no=1"],
         "tiled raised TypeError: "),
        (["traffic", "--kernel", SUM_TILES, "--arg", "i32[4]"], "i32[4] has no values"),
        (["traffic", "--kernel", SUM_TILES, "--arg", "i32[4]=1"], "missing 2 required positional"),
    ],
)  # fmt: skip
def test_calls_that_cannot_be_are_refused_in_words(command, words, capsys):
    assert main(["lab", *command]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.parametrize("command", [["schedule", "--case", "decode"], ["predict"]])
@pytest.mark.parametrize("chip", ["v5p", "TPU v5p"])
def test_a_chip_whose_schedules_are_not_executed_is_refused_in_words(command, chip, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["lab", *command, "--chip", chip])
    words = "chip is v5p, but schedules can be executed for v5e, v6e, tpu7x only"
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_bench_refuses_sizes_before_it_times_anything(capsys):
    sizes = ["--page-size", "3", "--kv-dtype", "float8_e4m3fn"]
    assert main(["bench", *sizes]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "page_size must be a multiple of 4 for float8_e4m3fn" in err


# --- Options of a kernel ----------------------------------------------------------------------


@needs_libtpu
@pytest.mark.parametrize("kernel", ["rpa", "plain"])
def test_predictions_take_sinks_and_windows(kernel):
    batch = make_batch([(1, 600), (1, 300)], 64)
    sizes = {"model": (8, 2, 128), "page_size": 64}
    sinks = np.ones(8, np.float32)
    without = predict_batch(kernel, "v6e", batch, **sizes)
    with_sinks = predict_batch(kernel, "v6e", batch, **sizes, options={"attention_sink": sinks})
    # Rung 7 has sinks in any case, of -inf where the caller gives none.
    assert (with_sinks.bundles != without.bundles) == (kernel == "rpa")
    options = {"attention_sink": sinks, "sliding_window": 64}
    window = predict_batch(kernel, "v6e", batch, **sizes, options=options)
    assert window.hbm_bytes < without.hbm_bytes and window.least_bytes < without.least_bytes
    assert 0 < window.mbu < 1


def test_traffic_takes_options_and_its_least_follows_the_window(capsys):
    command = ["lab", "traffic", "--batch", "2x1/1000", "--page-size", "128"]
    command += ["--option", "sliding_window=100", "--option", "attention_sink=f32[32]=ones"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    token_bytes = 2 * 8 * 128 * 2
    assert found["least"]["KV read"] == found["kinds"]["KV read"]["num_bytes"] == 198 * token_bytes


LENGTHS = [(1, 40), (7, 7), (5, 29), (12, 30)]


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
def test_the_least_under_a_window_counts_what_some_query_sees(window):
    """Counted against the mask, one (query, key) pair at a time."""
    layer, pairs, keys = AttentionShape(8, 2, 128, page_size=8), 0, []
    for q_len, kv_len in LENGTHS:
        q = np.arange(kv_len - q_len, kv_len)[:, None]
        k = np.arange(kv_len)[None, :]
        seen = (k <= q) & (k > q - (window or kv_len))
        pairs += seen.sum()
        keys.append((seen, kv_len - q_len))
    q_lens, kv_lens = zip(*LENGTHS, strict=True)
    cost = attention_cost(q_lens, kv_lens, 8, 2, 128, sliding_window=window)
    assert cost.flops == 4 * 8 * 128 * pairs
    read = sum(seen.any(axis=0).sum() for seen, _ in keys)
    assert cost.kv_read_bytes == read * layer.true_token_bytes
    batch = make_batch(LENGTHS, 8)
    for block in (None, 1, 4):
        parts = [
            (part.any(axis=0), cached)
            for seen, cached in keys
            for part in np.split(seen, range(block, len(seen), block) if block else [])
        ]
        moved = least(batch, layer, block, window)
        assert moved["KV read"] == sum(p[:c].sum() for p, c in parts) * layer.token_bytes
        assert moved["new KV"] == sum(p[c:].sum() for p, c in parts) * layer.token_bytes
    pages = sum(len(np.unique(np.flatnonzero(seen.any(axis=0)) // 8)) for seen, _ in keys)
    assert moved["page table"] == 4 * pages
