"""Model files on this machine and elsewhere: find, download, lock, verify."""
