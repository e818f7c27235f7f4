"""The idea: a gate decides, an executor carries out, a trace accounts, a budget steers. Knows nothing above it."""
