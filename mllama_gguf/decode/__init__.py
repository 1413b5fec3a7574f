"""Tokens to replies: what runs the model."""
