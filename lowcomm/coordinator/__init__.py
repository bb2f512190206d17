"""The process that decides who takes part in each round, and what ranks use to ask it."""
