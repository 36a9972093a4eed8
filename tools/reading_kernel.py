"""How far a reader of rung 8 has to turn back: code lines, words, and the ways of its records.

While the two kernels of one call are traced, this follows the plan and the unit of work as
arguments from function to function, each pair of caller and callee once. A *stay* is a stretch in
one file, a *return* a stay in a file that was read before.

    python tools/reading_kernel.py
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

import jax

import rpa.kernel
from rpa.lab import programs

FOLLOWED = {"plan": {"Plan"}, "unit of work": {"WorkItem", "Step", "_Work", "QueryBlock"}}
"""What is followed: names of its classes, also those of earlier versions."""

FOLDER = Path(rpa.kernel.__file__).parent
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def code_lines(text):
    """Lines that are neither blank, comment nor docstring."""
    docs = set()
    for node in ast.walk(ast.parse(text)):
        value = getattr(node, "value", None)
        if isinstance(node, ast.Expr) and isinstance(getattr(value, "value", None), str):
            docs |= set(range(node.lineno, node.end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return len({t.start[0] for t in tokens if t.type not in NO_CODE and t.string} - docs)


def ways(function):
    """{what is followed: the files in which it stays, in order} while `function()` runs."""
    stays, seen = {name: [] for name in FOLLOWED}, set()

    def on_call(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event != "call" or path.parent != FOLDER:
            return
        edge = (frame.f_back.f_code, frame.f_code)
        if edge in seen or path.stem in ("api", "blocks"):
            return
        given = {type(value).__name__ for value in _values(frame)}
        for name, classes in FOLLOWED.items():
            if given & classes:
                seen.add(edge)
                if stays[name][-1:] != [path.stem]:
                    stays[name].append(path.stem)

    sys.setprofile(on_call)
    try:
        function()
    finally:
        sys.setprofile(None)
    return stays


def _values(frame):
    """The arguments of a call, and what is in tuples and lists of them."""
    code = frame.f_code
    for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        value = frame.f_locals.get(name)
        yield value
        if type(value) in (tuple, list):
            yield from value


def trace_both():
    """Trace decode and mixed of Llama 3 8B."""
    program = programs.kernel(programs.Workload(page_size=128, num_seqs=8, q_len=512))
    attend = rpa.kernel.ragged_paged_attention
    jax.eval_shape(lambda *a: attend(*a, backend="tpu", chip="v6e", validate=False), *program.args)


if __name__ == "__main__":
    texts = [path.read_text() for path in sorted(FOLDER.glob("*.py"))]
    print("code lines:", sum(map(code_lines, texts)), " words:", sum(len(t.split()) for t in texts))
    for name, files in ways(trace_both).items():
        returns = len(files) - len(set(files))
        print(f"{name}: {len(files)} stays in {len(set(files))} files, {returns} returns")
        print("   ", " ".join(files))
