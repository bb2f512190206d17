"""A cluster on one machine: the same code on a virtual clock."""
