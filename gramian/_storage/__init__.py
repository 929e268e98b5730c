"""Files, folders, progress and interrupts."""
