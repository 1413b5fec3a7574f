"""A page that shows a batch: images, captions, failures. cli/ imports it."""
