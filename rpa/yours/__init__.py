"""Your own kernel: `my_rpa.py`, the file that grows from exercise to exercise.

When the check of an exercise on the assembly line is passed in a notebook, the cell that holds the
answer is written to `my_rpa.py` in the folder of that notebook: the next notebook, and the next
day, begin with what you have. A later exercise takes your functions from there:

    attend, new_state = rpa.yours.earlier("attend", "new_state")

and where the exercise that defines them is not solved, it takes those of `rpa.yours.reference` and
says so. The environment variable `RPA_YOURS` names another folder, and then plain Python collects,
too; `RPA_YOURS=off` collects nothing. On Colab and Kaggle the folder goes with the machine: mount
your Drive and set `%env RPA_YOURS=/content/drive/MyDrive` before the first check.

`rpa.yours.reference` is the file of one who has solved it all; `python -m course.build` writes it.
"""

from rpa.check.yours import LINE, collect, earlier, yours_path

__all__ = ["LINE", "collect", "earlier", "yours_path"]
