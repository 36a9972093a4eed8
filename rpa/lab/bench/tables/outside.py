"""Around the kernel: the compiler's time beside v3's, and what real TPUs took, as published."""

from rpa.lab.bench import compile_time, published
from rpa.lab.bench.tables.table import Scope, Table


def _compile_cells(scope: Scope):
    return [{"chip": chip, "shapes": row} for row in compile_time.ROWS for chip in scope.chips]


def _compile(chip, shapes):
    c = compile_time.compare_row(shapes, chip, "v3", repeats=2)
    if not c.ours.ok:
        return {"note": c.ours.error}
    theirs_s = compile_time.cpu_s(c.theirs) if c.theirs is not None and c.theirs.ok else None
    return {"rung 8 s": compile_time.cpu_s(c.ours), "v3 s": theirs_s, "of v3": c.ratio}


COMPILE = Table(
    "compile time",
    "CPU seconds to trace, lower and compile, without a dump, both at the same blocks (decode "
    "1,024, mixed 128 x 1,024 in products of 512); the faster of two runs. Goal: 1.25 of v3.",
    {"chip": "", "shapes": "", "rung 8 s": ".1f", "v3 s": ".1f", "of v3": ".2f"},
    _compile_cells,
    _compile,
    in_quick=False,
)


def _published_cells(scope: Scope):
    return [
        {"source": t.source, "kernel": t.kernel, "place": place}
        for place, t in enumerate(published.TIMINGS)
        if t.kernel in scope.kernels
    ]


def _published(*, source, kernel, place):
    t = published.TIMINGS[place]
    bkv = next(iter(t.blocks.values()))[2 if kernel == "batched" else 1]
    p = published.predict(t)
    return {
        "batch": f"{t.num_seqs}x{t.q_len}/{t.kv_len}", "block": bkv,
        "window": t.options.get("sliding_window"), "published us": t.time_us,
        "at peak us": p.time_us, "error": p.time_us / t.time_us - 1,
        "on a chip us": p.calibrated_us, "its error": p.calibrated_us / t.time_us - 1,
        "range": f"{p.low_us:,.1f} to {p.high_us:,.1f}",
    }  # fmt: skip


PUBLISHED = Table(
    "published",
    "The peers' kernels on a real TPU7x, as published, beside what the lab predicts for the same "
    "kernels at the same shapes. On a chip: with five numbers fitted to these and 48 more timings.",
    {"source": "", "kernel": "", "batch": ">", "block": ",d", "window": "d",
     "published us": ",.1f", "at peak us": ",.1f", "error": "+.0%", "on a chip us": ",.1f",
     "its error": "+.0%", "range": ""},
    _published_cells,
    _published,
    in_quick=False,
)  # fmt: skip
