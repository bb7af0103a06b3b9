"""What a forker of the algorithm need not open: paged generation, how it reads its cache, checks before it."""
