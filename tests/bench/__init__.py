"""Side-by-side measurement of attnd: load generators, the peers, the arithmetic and the report.

`python -m tests.bench.classify` is the command. Nothing here is part of the service, and nothing imports it.
"""
