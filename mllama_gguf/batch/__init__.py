"""Thousands of pictures: list them, prepare them ahead, caption them, keep the results."""
