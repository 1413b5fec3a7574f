"""libmllama, in this process or in a child: load it, list devices, plan what fits, open models.

Knows no text and no images.
"""
