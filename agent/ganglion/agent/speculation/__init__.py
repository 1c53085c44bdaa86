"""Speculative decoding: what drafts (`engine`, `drafters`, `early`), and how long a window is worth it (`window`)."""
