"""Experts beyond memory: a global cache of pages, filled by explicit reads, ahead where that can be."""
