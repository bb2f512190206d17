"""A cluster as a config: its hosts, how fast they compute, and what goes wrong."""
