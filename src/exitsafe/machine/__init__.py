"""The machine that a model runs on: devices, memory and processes."""
