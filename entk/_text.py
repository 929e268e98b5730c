"""Tables as text, in the characters that standard output has."""

from __future__ import annotations

import io
import sys
from typing import Any

from rich.console import Console


def as_text(table: Any, width: int) -> str:
    """What rich prints of `table`.

    A log in ASCII or a Windows code page has no Greek letters and no lines of boxes, and `print` would stop at them:
    "?" stands for what standard output cannot encode, and boxes are drawn with what it has.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding, errors="replace", newline="\n")
    Console(file=file, width=width, force_jupyter=False).print(table)
    file.flush()
    return written.getvalue().decode(encoding)
