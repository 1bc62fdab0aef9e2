"""Floor 2: the decoder and the families whose numbers drive it."""
