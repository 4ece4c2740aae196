"""The sharding lab: what a strategy costs on a TPU slice, by compiling for it where there is no TPU."""
