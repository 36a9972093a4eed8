"""The course's sources and the build that turns them into notebooks; see course/README.md."""
