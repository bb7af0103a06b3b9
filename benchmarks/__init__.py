"""Benchmarks: their items (sets.py), who is right (judge.py, verify.py), and scores (scores.py)."""
