"""The architecture: its description (config), its layers and its key/value cache."""
