"""Compiled in haste: only with options that this XLA, and libtpu where it listens, knows."""

import jax
import pytest

from rpa.check.sandbox import fast_compile


@pytest.fixture(autouse=True)
def found_out_anew():
    fast_compile.options.cache_clear()
    yield
    fast_compile.options.cache_clear()


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    before = fast_compile.options()
    monkeypatch.setitem(fast_compile._IN_HASTE, "xla_cpu_no_such_option", True)
    fast_compile.options.cache_clear()
    assert fast_compile.options() == before


def test_on_a_tpu_libtpu_is_not_told_of_options_of_the_cpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert fast_compile.xla_flags() == "--xla_backend_optimization_level=0"
