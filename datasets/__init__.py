"""Where images come from, and what is done to a batch of them. README.md lists the modules."""
