"""Benchmarks: each one times our code, its competitor and its ceiling in turn, and asserts the answers."""
