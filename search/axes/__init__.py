"""The axes of the space of a search, one part of a plan in each file."""
