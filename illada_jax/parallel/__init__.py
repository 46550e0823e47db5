"""Meshes and shardings: how arrays lie over devices."""
