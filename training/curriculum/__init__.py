"""Generated tasks in Harbor's format, of the sixteen families that the embedded checkpoint was taught."""
