"""Ways of making sandboxes, each behind the same port."""
