"""What a command took: minutes, and minutes of a processor, which other programs do not add to."""

import os
import time
from typing import NamedTuple


class Clock(NamedTuple):
    """A wall clock, and the processor's time of this process and of the workers that ended.

    >>> print(Clock(90.0, 150.0) - Clock(30.0, 30.0))
    1.0 minutes (2.0 of a processor)
    """

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> "Clock":
        """Both, now; only differences mean something."""
        return cls(time.monotonic(), sum(os.times()[:4]))

    def __sub__(self, other):
        return Clock(self.wall_s - other.wall_s, self.cpu_s - other.cpu_s)

    def __str__(self):
        return f"{self.wall_s / 60:.1f} minutes ({self.cpu_s / 60:.1f} of a processor)"
