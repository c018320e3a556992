"""Model definitions: one file per family, named after its `model_type`, on the shared blocks of `layers.py`."""
