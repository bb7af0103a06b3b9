"""One step timed, the plan before renting, the same step through TRL: `python -m bench`."""
