"""What drawing a token means: parameters, adjustments, filters and the keyed noise (D7). Pure."""
