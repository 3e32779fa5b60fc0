"""Lists of experiments: what they are, how they run, what they say together."""
