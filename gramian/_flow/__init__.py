"""Gradient flow: exponential steps, their control, what is recorded on the way (theory §§2, 5)."""
