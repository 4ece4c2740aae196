"""Places: where files are, on a disk or in an object store, read and written alike."""
