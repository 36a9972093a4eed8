"""The learner's own file, `my_rpa.py`: how it grows, and what later exercises take from it.

| file | what it holds |
|---|---|
| `growing.py` | the file: its sections, how one is added, what it imports |
| `earlier.py` | functions of earlier exercises: the learner's, or the reference's |

`rpa.yours` is the door for notebooks.
"""

from rpa.check.yours.earlier import LINE, earlier, functions_used
from rpa.check.yours.growing import collect, yours_path

__all__ = ["LINE", "collect", "earlier", "functions_used", "yours_path"]
