"""Reports: everything about one run at once."""
