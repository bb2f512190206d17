"""What surrounds the inner optimizer: learning-rate schedules and parameter groups."""
