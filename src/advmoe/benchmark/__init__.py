"""Is the system as fast as its cost says? Everything that measures it: suites, one runner, one type of row."""
