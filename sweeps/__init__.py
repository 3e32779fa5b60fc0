"""What sweep.py is made of: experiments over several seeds. README.md lists the modules."""
