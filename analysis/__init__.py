"""Reads what runs wrote and compares them, without torch. README.md lists the modules."""
