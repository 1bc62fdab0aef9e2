"""Evaluation on benchmarks: judgments sampled once, every vote and every k' measured from them."""
