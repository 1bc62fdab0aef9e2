"""Floor 2: examples from files, verdicts to files."""
