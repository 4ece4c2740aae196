"""File access with one interface for local disks and object stores."""
