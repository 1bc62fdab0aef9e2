"""Floor 3: what is trained, its log-probabilities, and how gradients move it."""
