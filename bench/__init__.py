"""What benchmark.py measures. README.md lists the modules."""
