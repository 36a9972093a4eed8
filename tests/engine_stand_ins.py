"""Lets the engines' attention layers be imported without vLLM, torch and the rest of a server.

The layers are the real code, as installed. What they import next to it and do not call here is an
empty module that answers every name.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from unittest import mock

ABSENT = (
    "datasets",
    "sympy",
    "PIL",
    "aiohttp",
    "cv2",
    "fastapi",
    "flax",
    "httpx",
    "huggingface_hub",
    "jaxtyping",
    "jinja2",
    "librosa",
    "llguidance",
    "modelscope",
    "msgpack",
    "numba",
    "openai",
    "orjson",
    "outlines",
    "pandas",
    "partial_json_parser",
    "pathwaysutils",
    "prometheus_client",
    "psutil",
    "pybase64",
    "pydantic",
    "qwix",
    "requests",
    "safetensors",
    "setproctitle",
    "soundfile",
    "tiktoken",
    "torch",
    "torchax",
    "torchvision",
    "transformers",
    "uvicorn",
    "uvloop",
    "vllm",
    "xgrammar",
    "zmq",
)
"""What a server installs besides. Used where it is installed, `vllm` apart: it would import all."""


class _AnyClass(type):
    """Of classes that have every attribute."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=name)


class _StandIn(types.ModuleType):
    """A module in which every name is a mock, and a class where one is derived from."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        is_class = name[0].isupper() and not name.isupper()
        value = _AnyClass(name, (), {}) if is_class else mock.MagicMock(name=name)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


def install(engine: str):
    """Stand-ins for what `engine` (the name of its package) imports and this machine has not.

    The package's own `__init__` does not run: it asks a metadata server which TPU this is.
    """
    absent = [name for name in ABSENT if importlib.util.find_spec(name) is None]
    sys.meta_path.insert(0, _Finder({"vllm", *absent}))
    package = types.ModuleType(engine)
    package.__path__ = list(importlib.util.find_spec(engine).submodule_search_locations)
    sys.modules[engine] = package
