"""The page that shows a run: `python -m report RUN [RUN ...]`."""
