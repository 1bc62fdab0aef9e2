"""Floor 3: weights from files into parameters."""
