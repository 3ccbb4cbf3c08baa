"""Benchmarks of single parts, each writing one JSON file."""
