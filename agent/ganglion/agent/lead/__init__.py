"""The token loop: what runs next (`scheduler`), which token is drawn (`sampler`), and who drives it (`driver`)."""
