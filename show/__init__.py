"""What show_example.py does with a checkpoint. README.md lists the modules."""
