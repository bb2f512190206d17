"""The inner loop of one replica."""
