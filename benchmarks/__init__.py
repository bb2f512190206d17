"""One script for each published claim: ``python -m benchmarks.NAME --help``, from the repository's root.

Each prints what it finds and leaves a record in ``benchmarks/results/NAME`` (see `benchmarks.record`).
"""
