"""The paper's recipe: sample judgments of labelled items, keep what is right, fine-tune, then reinforce."""
