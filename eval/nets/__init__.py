"""Networks whose features are scored."""
