"""What the operators of a run say: identities, channel, cells, coupling (theory §§2, 6)."""
