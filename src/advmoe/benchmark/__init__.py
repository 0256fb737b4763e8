"""Benchmarks, which show whether the system is as fast as its cost suggests: suites, one runner, one type of row."""
