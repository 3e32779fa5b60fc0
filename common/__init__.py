"""The bottom package, which imports nothing else of this repository.

errors: the exception with a message for the user; text: printable text; files: writes that survive
a crash; checkpoint: saving and loading tensors; free_memory: free memory of a device; scopes: what
each argument is about; command_line: the argument parser and the exit status of a script.
"""
