"""Layers: read-only EROFS images, named by their digest, that sandboxes are composed of.

Sources (a directory, a tar stream, the disk of a frozen sandbox) become a tree of nodes whose data is
written on the way; one writer makes the image; the kernel mounts it and it is compared with the tree
before it gets a name.  Nothing is ever unpacked on the host.

See: docs/formats/layers.md; `store.LayerStore` is the way in.
"""
