"""Thousands of images: list them, prepare them ahead, caption them, keep the results."""
