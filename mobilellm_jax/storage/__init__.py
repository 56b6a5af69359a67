"""Files and folders: written whole or not at all, sealed with hashes, read with suspicion."""
