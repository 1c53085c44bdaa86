"""Servers that speak OpenAI's HTTP API, as verifiers of drafted tokens."""
