"""The loop and what is around it: steps, evaluation, what is on disk, devices, signals."""
