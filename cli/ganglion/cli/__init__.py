"""The `ganglion` command; composes the other rooms."""
