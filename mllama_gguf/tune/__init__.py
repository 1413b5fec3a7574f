"""Measuring this machine: the fastest settings for a model, and where they are kept."""
