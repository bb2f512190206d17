"""What a simulated run leaves: its timeline, and its times without values."""
