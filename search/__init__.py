"""Training-free search of sampling plans."""
