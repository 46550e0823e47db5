"""Shardings of arrays over devices, and several processes that work as one.

Begin with `sharding`: one table maps the model's logical axes to the mesh axes data, fsdp and tensor, and all shardings
follow from it. `mesh` makes meshes (a single device is a mesh of one), `hosts` joins several processes, `fingerprints`
detects corrupt arrays.

May import `config` and `errors` only.
"""
