"""Collectives: who sends which partial sum to whom (`plan`), and the driver that does it over lanes (`allreduce`)."""
