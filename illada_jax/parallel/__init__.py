"""How arrays lie over devices, and how several processes work as one.

Begin with `sharding`: one table maps the model's logical axes to the mesh axes data, fsdp and tensor, and everything
else follows from it. `mesh` makes meshes (of one device too), `hosts` starts and ends runs of several processes,
`fingerprint` tells whether an array is still what it was.

May import the config alone.
"""
