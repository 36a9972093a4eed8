"""Functions by name: "module:function", or "file.py:function" for a kernel of one's own.

The lab compiles in another process, so a function has to be found again by its name there.
"""

import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
"""The folder `rpa`."""


def import_path(fn) -> str:
    """ "module:function" or "/absolute/file.py:function" of what another process can import.

    Args:
        fn: a function at the top level of a module, or its name in one of the two forms.

    Raises:
        ValueError: if it cannot be found by a name, or the file does not exist.

    >>> import_path("rpa.tiled:flash_attention")
    'rpa.tiled:flash_attention'
    """
    if isinstance(fn, str):
        path = fn
    else:
        fn = inspect.unwrap(fn)
        path = f"{getattr(fn, '__module__', None)}:{getattr(fn, '__qualname__', fn)}"
    module, _, name = path.rpartition(":")
    if module in ("", "None", "__main__") or not name.isidentifier():
        raise ValueError(
            f"fn is {path}, but must be a function at the top level of a module that can be "
            "imported, because another process compiles it: write it to a file "
            "(%%writefile my_kernel.py in a notebook) and pass 'my_kernel.py:function'; pass what "
            "a functools.partial would fix by kwargs."
        )
    if not is_file(path):
        return path
    file = Path(module).expanduser().resolve()
    if not file.is_file():
        raise ValueError(
            f"there is no file {module}: expected 'file.py:function', seen from the folder "
            f"{Path.cwd()}."
        )
    return f"{file}:{name}"


def is_file(path: str) -> bool:
    """Whether a name says a file, and not a module.

    >>> is_file("my_rpa.py:ragged_attention"), is_file("my_rpa:ragged_attention")
    (True, False)
    """
    return path.rpartition(":")[0].endswith(".py")


def is_own(kernel) -> bool:
    """Whether the lab is asked for a kernel of one's own, and not for one that it knows by name.

    >>> is_own("my_rpa.py:ragged_attention"), is_own("rpa")
    (True, False)
    """
    return ":" in kernel


def load(path: str):
    """The function of a name; the file of a name is run anew, and may import its neighbours.

    Raises:
        ValueError: if the file or module has no such function.

    >>> load("rpa.paging:cdiv")(7, 2)
    4
    """
    where, _, name = import_path(path).rpartition(":")
    module = load_module(path)
    if not callable(getattr(module, name, None)):
        functions = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        own = [n for n in functions if getattr(module, n).__module__ == module.__name__]
        raise ValueError(f"{where} has no function {name}; it has: {', '.join(own) or 'none'}.")
    return getattr(module, name)


def load_module(path: str):
    """The module of a function's name, imported; a file is run anew.

    >>> load_module("rpa.paging:cdiv").__name__
    'rpa.paging'
    """
    where = import_path(path).rpartition(":")[0]
    return _run_file(Path(where)) if is_file(path) else importlib.import_module(where)


def module_of(path: str):
    """The module that `load(path)` has loaded, or None.

    >>> module_of("rpa.paging:cdiv").__name__
    'rpa.paging'
    """
    where = path.rpartition(":")[0]
    return sys.modules.get(Path(where).stem if is_file(path) else where)


def line_of(error) -> str:
    """ "file:line, in function" of the last line of the caller's own that raised an error."""
    frame = _own_frame(error)
    path = Path(frame.filename)
    # A file of rpa from its package on, which is the same on every machine.
    name = path.relative_to(PACKAGE.parent) if path.is_relative_to(PACKAGE) else path
    return f"{name}:{frame.lineno}, in {frame.name}"


def is_in_package(error) -> bool:
    """Whether that line is one of rpa's."""
    return Path(_own_frame(error).filename).is_relative_to(PACKAGE)


def _own_frame(error):
    """The last frame that is the caller's or rpa's: what JAX did below it says little."""
    frames = traceback.extract_tb(error.__traceback__)
    # Where rpa is installed, it lies in site-packages, too; its frames are never absent.
    own = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename or frame.filename.startswith(str(PACKAGE))
    ]
    return own[-1]


def _run_file(file: Path):
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module
