"""Python generated from the `.proto` files beside this folder; see `proto/generate.py`."""
