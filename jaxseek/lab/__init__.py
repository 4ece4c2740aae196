"""The sharding lab: estimate what a strategy costs on a TPU slice by compiling for it, without the TPU."""
