"""A quantiser in numpy, and tiny models of its numbers, quantised and ordinary."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from oracles import random_model

from jaxseek.config.formats import Spec
from jaxseek.model.deepseek import DeepSeek
from jaxseek.model.weight import MATRICES, quantized
from jaxseek.sharding.parameters import fill, parameters

LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}
# Groups of 12 divide 48 and 24 inputs, leave the last of 32 and 16 short, and are longer than 8.
SPECS = {"int8": Spec("int8", None), "int4": Spec("int4", 12), "fp8": Spec("float8_e4m3fn", 12)}


def quantize(name, numbers, spec):
    """(value, scale, their product): the largest of each group is the largest that the dtype has."""
    letters = name.rsplit("_", 1)[1]
    axes = [letters.index(i) - len(letters) for i in MATRICES[name]]
    numbers, amax = np.asarray(numbers, np.float32), np.abs(numbers)
    if spec.group is None:
        amax = spread = amax.max(axis=tuple(axes), keepdims=True)
    else:
        n = numbers.shape[axes[-1]]
        g = math.gcd(spec.group, n) if len(axes) > 1 else spec.group
        groups = np.split(amax, range(g, n, g), axes[-1])
        amax = np.concatenate([part.max(axes[-1], keepdims=True) for part in groups], axes[-1])
        spread = amax.repeat(g, axes[-1]).take(range(n), axes[-1])
    scale, spread = (np.float32(a / LARGEST[spec.dtype]) for a in (amax, spread))
    value = numbers / spread
    value = (np.rint(value) if spec.dtype.startswith("int") else value).astype(jnp.dtype(spec.dtype))
    return value, scale, value.astype(np.float32) * spread


@functools.cache
def arrays_of(cfg, spec):
    """(arrays of the quantised model, of the ordinary one with the same numbers, by path)."""
    made, numbers = {}, {}
    for path, param in parameters(random_model(cfg)).items():
        name, array = path.rsplit(".", 1)[-1], np.asarray(param.get_value())
        numbers[path] = made[path] = array
        if name in MATRICES:
            del made[path]
            made[f"{path}.value"], made[f"{path}.scale"], numbers[path] = quantize(name, array, spec)
    return made, numbers


def filled(model, arrays):
    def make(path, param, sharding):
        return jax.make_array_from_callback(param.shape, sharding, lambda index: arrays[path][index])

    return fill(model, model.strategy.make_mesh(), make)


@functools.cache
def quantized_model(cfg, kind, mesh=None):
    abstract = DeepSeek.abstract(cfg, mesh)
    paths = [path for path in parameters(abstract) if path.rsplit(".", 1)[-1] in MATRICES]
    return filled(quantized(abstract, dict.fromkeys(paths, SPECS[kind])), arrays_of(cfg, SPECS[kind])[0])


@functools.cache
def ordinary_model(cfg, kind):
    return filled(DeepSeek.abstract(cfg), arrays_of(cfg, SPECS[kind])[1])
