"""Deployments: one state machine each, and the driver that carries out what they want."""
