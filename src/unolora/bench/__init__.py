"""The measurements of benchmarks.md, each a function that returns ratios."""
