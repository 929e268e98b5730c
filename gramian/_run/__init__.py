"""Recorded runs: an optimizer's steps as linear maps, and the operators of a whole run (theory §§3, 4)."""
