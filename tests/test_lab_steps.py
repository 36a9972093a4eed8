"""From rung 7 to rung 8: every step is there, worth something on some chip, a loss on none."""

import pytest

from rpa.cli import steps as command
from rpa.lab.schedule import inner_loop, steps
from rpa.lab.schedule.schedule import NoSchedule


def test_the_steps_of_the_inner_loop_follow_on_each_other_from_the_first_to_the_last():
    pairs = [step.bench for step in steps.STEPS if step.bench is not None]
    assert pairs[0][0] == 0 and pairs[-1][1] == len(inner_loop.STEPS) - 1
    assert [before for before, _ in pairs[1:]] == [after for _, after in pairs[:-1]]


def test_every_step_is_worth_something_on_some_chip_and_costs_nothing_on_any():
    found = steps.rows()
    assert {row.step for row in found} == {step.name for step in steps.STEPS}
    for row in found:
        factors = [row.values[chip][0] / row.values[chip][1] for chip in steps.CHIPS]
        assert max(factors) > 1.02, row
        assert min(factors) > 0.999, row


def test_the_command_prints_a_line_per_row_and_every_reason(capsys):
    class Options:
        compile, json = False, False

    assert command.main(Options) == 0
    said = capsys.readouterr().out
    for step in steps.STEPS:
        assert f"{step.name}: {step.change}.\n   Why: {step.why}." in said
    assert said.count("kernel, decode") == sum("decode" in step.cases for step in steps.STEPS)


def test_without_a_compiler_the_command_says_what_it_can_print(capsys, monkeypatch):
    def no_compiler(**_):
        raise NoSchedule("no libtpu", "libtpu is not installed.")

    class Options:
        compile, json = True, False

    monkeypatch.setattr(steps, "rows", no_compiler)
    assert command.main(Options) == 1
    assert "Without --compile the recorded numbers are printed" in capsys.readouterr().err


@pytest.mark.parametrize("chip", steps.CHIPS)
def test_the_kernel_that_nothing_is_taken_from_is_the_recorded_one(chip):
    everything = steps.recorded("without")
    kernels = steps.recorded("kernels")[chip]
    assert everything["nothing, decode"][chip] == kernels["decode"]["step_1024"]
    assert everything["nothing, mixed"][chip] == kernels["mixed"]["executed_per_chunk"]
