"""One rank a GPU."""

from course_lib.ranks.errors import DeadlockError, MismatchError
from course_lib.ranks.running import run

__all__ = ["DeadlockError", "MismatchError", "run"]
