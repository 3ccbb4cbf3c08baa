"""The scripts that trained what ships in ``eval/demo``."""
