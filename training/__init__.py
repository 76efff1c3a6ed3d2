"""How the embedded checkpoint is made and measured; see README.md."""
