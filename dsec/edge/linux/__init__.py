"""What the host offers and how to ask for it: thin and typed, no policy."""
