"""The made-up encyclopedia, the tiny base model, and the experiments on them: `python -m miniature`."""
