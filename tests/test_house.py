"""The house: which module imports which. Imports inside functions count, too."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rpa"

ROOMS = [
    "compat",
    "interpreter",
    "chips",
    "page_pool",
    "dense",
    "paging",
    "validation",
    "ragged",
    "shapes",
    "tiled",
    "streamed",
    "fused",
    "plain",
    "forward_only",
    "kernel",
    "ladder",
    "lab.arguments",
    "lab.batches",
    "lab.compile",
    "lab.programs",
    "lab.peers",
    "lab.schedule",
    "lab.copies",
    "check",
    "traces",
    "yours",
    "lab.predict",
    "lab.bench",
    "lab.chip",
    "selftest",
    "lab.chip.hunt",
    "lab.chip.conformance",
    "lab",
    "figures",
    "doctor",
    "parallel",
    "lab.parallel",
    "models",
    "check.chapters",
    "cli",
    "demo_server",
    "demo_devices",
    "demo",
    "integrations",
]
"""From the bottom to the top: a room imports itself and rooms before it. `rpa` and `rpa.__main__`
are the doors on top of all; they import what they are asked for."""


def modules() -> dict[str, Path]:
    """{name: file} of all modules of the package."""
    names = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = modules()


def imports(module) -> set[str]:
    """Modules of the package that one imports, anywhere in its file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES:  # a function of a module
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {"", "rpa", module}


IMPORTS = {module: imports(module) for module in MODULES}


def room(module) -> str:
    """The room of a module: the longest name in ROOMS that it begins with."""
    path = module.removeprefix("rpa.")
    fitting = [name for name in ROOMS if f"{path}.".startswith(f"{name}.")]
    return max(fitting, key=len, default=path)


def test_every_room_is_listed_and_there():
    outside = {"rpa", "__main__", "_repository"}
    rooms = {room(module) for module in MODULES} - outside
    assert rooms == set(ROOMS)


def test_arrows_go_down_only():
    up = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if {room(module), room(other)} <= set(ROOMS)
        and ROOMS.index(room(module)) < ROOMS.index(room(other))
    ]
    assert not up


def test_no_circle():
    """Whatever only imports what was taken away already is taken away; a circle stays."""
    left = {module: set(others) for module, others in IMPORTS.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"in or above a circle: {', '.join(sorted(left))}"
