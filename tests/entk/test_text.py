"""Tables where standard output is not UTF-8."""

import io
import sys

import jax.numpy as jnp
import pytest
from rich.table import Table

from entk import plan
from entk._text import as_text


def table() -> Table:
    made = Table(title="Φ(T)")
    made.add_column("λ")
    made.add_row("‖G ψ‖²")
    return made


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_text_is_what_standard_output_can_print(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    print(as_text(table(), 40))
    print(plan(lambda w, x: x @ w, jnp.ones((3, 1)), jnp.ones((4, 3))))
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue().decode(encoding)
    assert "?(T)" in printed
    assert "| ?G ?" in printed


@pytest.mark.parametrize("stream", [io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO(), None])
def test_text_is_whole_in_utf8_and_where_no_encoding_is_known(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    assert "│ ‖G ψ‖² │" in as_text(table(), 40)
