"""The lowest package: it imports nothing else of this repository. README.md lists the modules."""
