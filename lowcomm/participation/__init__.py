"""Who takes part in a round: rules that do not wait for the slowest, and the meeting that asks them.

Nothing here knows a clock, a thread or a wire: the coordinator's process and the simulator call the same code.
"""
