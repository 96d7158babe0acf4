"""Starting runs: chains of them, one after another."""
