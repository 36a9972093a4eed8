"""The matrix units (MXU): push weights, multiply rows, take products. See `rpa.lab.chip.mxu`."""

from rpa.lab.chip.instructions.table import by_operation


@by_operation("vmatprep.subr", form="%", attributes=["gain_latch_mode", "mxu_id"], machine=True)
def prepare_weights(operation):
    unit = int(operation.attributes["mxu_id"])
    return lambda machine, rows: machine.mxu(unit).prepare_weights(rows)


@by_operation(
    *["vlatch", "vlatchi"],
    form="%",
    attributes=["gain_latch_mode", "latch_variant", "mxu_id"],
    machine=True,
)
def push_weights(operation):
    unit, mode = int(operation.attributes["mxu_id"]), operation.attributes["gain_latch_mode"]
    half = int(operation.attributes.get("latch_variant", 0))
    return lambda machine, rows: machine.mxu(unit).push_weights(rows, mode, half)


@by_operation("vmatprep.mubr", form="%", attributes=["data_format", "mode", "mxu_id"], machine=True)
def prepare_rows(operation):
    unit = int(operation.attributes["mxu_id"])
    return lambda machine, rows: machine.mxu(unit).prepare_rows(rows)


@by_operation(
    *["vmatmul", "vmatmul.mubr"],
    form="%",
    attributes=["data_format", "dwg", "lmr_hint", "mode", "mxu_id"],
    machine=True,
)
def multiply(operation):
    found, unit = operation.attributes, int(operation.attributes["mxu_id"])
    # float8 is told by its format, parts of a float32 by the mode.
    mode = found["mode"] if found["data_format"] in ("bf16", "f32") else found["data_format"]
    return lambda machine, rows: machine.mxu(unit).multiply(rows, mode)


@by_operation("vmatres", form="", attributes=["data_format", "mxu_id"], machine=True)
def product(operation):
    unit = int(operation.attributes["mxu_id"])
    return lambda machine: machine.mxu(unit).pop_result()


@by_operation("vdwg", form="", attributes=["mxu_id"])
def weights_are_done(operation):
    """The weights are not needed any more. The next push replaces them anyway."""
    return lambda: None
