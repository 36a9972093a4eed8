"""Compiled in haste: only with options that this XLA, and libtpu where it listens, knows."""

import jax
import pytest

from rpa.check import haste


@pytest.fixture(autouse=True)
def found_out_anew():
    haste.options.cache_clear()
    yield
    haste.options.cache_clear()


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    before = haste.options()
    monkeypatch.setitem(haste._IN_HASTE, "xla_cpu_no_such_option", True)
    haste.options.cache_clear()
    assert haste.options() == before


def test_on_a_tpu_libtpu_is_not_told_of_options_of_the_cpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert haste.xla_flags() == "--xla_backend_optimization_level=0"
