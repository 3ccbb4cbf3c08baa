"""Networks whose features are scored. Importing this enters them in the registry and loads none."""

from . import efflite0, fashion_features, inception, transformers_nets

__all__ = ["efflite0", "fashion_features", "inception", "transformers_nets"]
