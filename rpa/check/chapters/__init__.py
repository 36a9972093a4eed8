"""The answer key of the course: a file per chapter, and what only their exercises need."""
