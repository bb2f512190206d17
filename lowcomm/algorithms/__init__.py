"""When replicas talk, and what about: one file for each method."""
