"""Predict how long a batch takes on a chip that is not here: from its schedule and its copies.

| file | what it holds |
|---|---|
| `batch.py` | the door, `predict_batch`; `predict_call` for a function of any signature |
| `waits.py` | how long an executed kernel takes with its waits for HBM |
| `calibration.py` | what published timings say about HBM: the fit, and its error |
| `roofline.py` | what bounds a batch, and the least time that it can take |
"""

from rpa.lab.predict.batch import Prediction, predict_batch

__all__ = ["Prediction", "predict_batch"]
