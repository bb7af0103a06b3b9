"""Try a model on a passage, or follow one training step: `python -m play`."""
