"""Using a trained folder."""
