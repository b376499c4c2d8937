"""What may be done to a program: contracts, patterns, the rewriter, the passes, and pipelines as data."""
