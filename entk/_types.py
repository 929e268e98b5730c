"""Names for what is passed everywhere."""

from collections.abc import Callable
from typing import Any

PyTree = Any
ApplyFn = Callable[[PyTree, PyTree], Any]  # one array; libraries type theirs loosely, so check_apply verifies it
