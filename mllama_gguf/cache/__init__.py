"""Results on disk that need not be computed again, and when two results are the same."""
