"""Side-by-side measurement of attnd: load generators, the peers, the arithmetic and the report.

The commands are `python -m tests.bench.classify`, `.generate`, `.translate` and `.attention`. Nothing here is part of
the service, and nothing imports it.
"""
