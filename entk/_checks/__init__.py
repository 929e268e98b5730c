"""What every entry asks of its arguments before memory is spent."""
