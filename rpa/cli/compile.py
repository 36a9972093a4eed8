"""`python -m rpa lab compile`: the compiler's answer from a terminal."""

import argparse
import dataclasses
import json

from rpa import chips
from rpa.cli import compile_time
from rpa.cli.call import is_call, require_own
from rpa.cli.options import DEFAULT, SEVERAL_CHIPS, add_options, kernel_of, whole
from rpa.lab import peers
from rpa.lab.compile.compiler import CompileResult, compile_for
from rpa.lab.compile.functions import is_own
from rpa.lab.programs import PROGRAMS, Program, Workload, own, own_call

KERNELS = PROGRAMS | peers.PROGRAMS
FOR_A_CHIP = ("kernel", *peers.PROGRAMS)
"""Kernels that choose their blocks for a chip, and so want its name."""


def add_arguments(parser: argparse.ArgumentParser):
    """Add the options of the experiment."""
    add_options(parser, "chip", chip=SEVERAL_CHIPS)
    what = parser.add_mutually_exclusive_group(required=True)
    names = f"{','.join(KERNELS)},FILE.py:FUNCTION"
    help_text = "rung, peer, or your own: with the ladder's signature, or with --arg"
    what.add_argument("--kernel", type=kernel_of(KERNELS), metavar=names, help=help_text)
    what.add_argument("--against", choices=["v3"], help="time rung 8 next to this peer, 5 models")
    add_options(parser, "arg", "option")
    default = Workload()
    add_options(parser, "share_lanes")
    for option in dataclasses.fields(Workload):
        if option.name in ("model", "dtype", "kv_dtype", "page_size"):
            changed = {option.name: {"default": getattr(default, option.name)}}
            add_options(parser, option.name, **changed)
        elif option.name != "share_lanes":
            parser.add_argument(
                f"--{option.name.replace('_', '-')}",
                type=whole(1, 2**20),
                default=getattr(default, option.name),
                help=DEFAULT,
            )
    parser.add_argument(
        "--repeats",
        type=whole(1, 1000),
        default=1,
        help="with --against: compile so often, the fastest counts",
    )
    parser.add_argument("--fresh", action="store_true", help="do not take a kept result")
    add_options(parser, "json")


def main(args) -> int:
    """Run the experiment; the exit code is 1 if a chip's compiler refused."""
    if args.against:
        return compile_time.main(args)
    program = program_of(args)
    results = [
        compile_for(
            chip,
            program.function,
            *program.args,
            kwargs=program.kwargs
            | ({"chip": chip} if args.kernel in FOR_A_CHIP else {})
            | dict(args.option),
            donate_argnums=program.donate_argnums,
            use_cache=not args.fresh,
        )
        for chip in args.chip or chips.CHIPS
    ]
    if args.json:
        print(json.dumps({"results": [dataclasses.asdict(r) for r in results]}, indent=2))
    else:
        for result in results:
            print(describe(result))
    return 0 if all(result.ok for result in results) else 1


def program_of(args) -> Program:
    """What is to be compiled.

    Raises:
        ValueError: for sizes that do not go together, or a function that cannot be found.
    """
    if is_call(args):
        require_own(args)
        return own_call(args.kernel, [argument.shape_dtype for argument in args.arg])
    sizes = Workload(
        **{each.name: getattr(args, each.name) for each in dataclasses.fields(Workload)}
    )
    return own(args.kernel, sizes) if is_own(args.kernel) else KERNELS[args.kernel](sizes)


def describe(result: CompileResult) -> str:
    """One line about a result, for people.

    >>> describe(CompileResult("v5e", "m:f", ok=False, error_kind="timeout", error="too slow"))
    'v5e    timeout: too slow'
    """
    if not result.ok:
        return f"{result.chip:6} {result.error_kind}: {result.error}"
    if not result.kernels:
        return (
            f"{result.chip:6} compiled in {result.compile_time_s:.1f} s, and there is no Pallas "
            "kernel in it: a kernel that asks for the interpreter (interpret=...) is none"
        )
    kept = " (kept from an earlier run)" if result.from_cache else ""
    return (
        f"{result.chip:6} compiled in {result.compile_time_s:.1f} s{kept}; "
        f"VMEM {result.vmem_used_bytes / chips.MIB:.1f} of "
        f"{chips.chip(result.chip).vmem_bytes / chips.MIB:.0f} MiB; "
        f"HBM {(result.argument_bytes + result.temp_bytes) / chips.MIB:.0f} MiB, "
        f"{result.temp_bytes / chips.MIB:.0f} MiB of it temporary"
    )
