"""What the training scripts share. README.md lists the modules."""
