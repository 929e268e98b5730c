"""Reproduction scripts, one a claim: `python -m experiments NAME`."""
