"""The diffusion process: corruption, the objective, likelihood bounds."""
