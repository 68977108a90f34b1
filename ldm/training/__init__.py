"""The training program behind main.py: command line, data, callbacks, checkpoints."""
