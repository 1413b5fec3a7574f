"""The command line: one file per command. Nothing of the package imports it."""
