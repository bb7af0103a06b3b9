"""What a forker of the algorithm need not open: paged generation and how it reads its cache."""
